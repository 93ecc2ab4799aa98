"""EDEN: a random rotation, then an optimal quantizer for normally distributed numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from statistics import NormalDist

import torch
from torch import Tensor

from lightning_fl.aggregation.compression.compressor import (
    Compressor,
    as_bytes,
    from_bytes,
    pack_bits,
    packed_size,
    unpack_bits,
)


@dataclass(frozen=True)
class EDEN(Compressor):
    r"""EDEN: quantization to 1, 2 or 4 bits after a random rotation; unbiased, except in few dimensions.

    The rotated numbers :math:`r = R v` are nearly normal. Each is replaced by :math:`q(r)`, the nearest of the
    :math:`2^b` values that are optimal for a normal distribution (Lloyd-Max). The scale makes the result unbiased:

    .. math::
        \hat v = \frac{\lVert v \rVert^2}{\langle r, q(r) \rangle} R^{-1} q(r)

    Args:
        bits: Bits :math:`b` per number: 1, 2 or 4. Default 1.

    Raises:
        ValueError: If ``bits`` is none of these.

    Reference:
        Vargaftik et al., "EDEN: Communication-Efficient and Robust Distributed Mean Estimation", ICML 2022.
    """

    bits: int = 1

    def __post_init__(self) -> None:
        if self.bits not in (1, 2, 4):
            raise ValueError(f"bits={self.bits} must be 1, 2 or 4.")

    def num_bytes(self, size: int) -> int:
        return 12 + packed_size(padded(size), self.bits)

    def encode(self, vector: Tensor, generator: torch.Generator) -> Tensor:
        seed = torch.randint(2**62, (1,), generator=generator)
        own = torch.zeros(padded(len(vector)), dtype=torch.float64)
        own[: len(vector)] = vector.detach().cpu()
        rotated = hadamard(own * signs(int(seed), len(own)))
        length = float(torch.linalg.vector_norm(rotated))
        normal = rotated * (math.sqrt(len(own)) / length) if length else rotated
        values = lloyd_max(self.bits)
        codes = torch.bucketize(normal, (values[1:] + values[:-1]) / 2)
        along = float(rotated @ values[codes])
        scale = torch.tensor(length**2 / along if along else 0.0, dtype=torch.float32)
        return torch.cat([as_bytes(seed), as_bytes(scale), pack_bits(codes, self.bits)])

    def decode(self, payload: Tensor, size: int) -> Tensor:
        self.check(payload, size)
        seed, scale = int(from_bytes(payload[:8], torch.int64)), from_bytes(payload[8:12], torch.float32)
        rotated = lloyd_max(self.bits)[unpack_bits(payload[12:], self.bits, padded(size)).long()]
        # The rotation is its own inverse, up to the signs.
        return (scale.double() * hadamard(rotated) * signs(seed, len(rotated)))[:size].float()


def padded(size: int) -> int:
    """The next power of two."""
    return 1 << max(0, size - 1).bit_length()


def signs(seed: int, size: int) -> Tensor:
    """Random signs, ``[size]``, float64."""
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randint(2, (size,), generator=generator, dtype=torch.float64) - 1


def hadamard(vector: Tensor) -> Tensor:
    """The orthonormal Walsh-Hadamard transform of a vector whose size is a power of two."""
    size, width = len(vector), 1
    while width < size:
        pairs = vector.view(-1, 2, width)
        vector = torch.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], dim=1).reshape(-1)
        width *= 2
    return vector / math.sqrt(size)


@lru_cache
def lloyd_max(bits: int) -> Tensor:
    """The ``2**bits`` values that quantize a standard normal variable with the least squared error, ascending."""
    normal, half = NormalDist(), 1 << (bits - 1)
    values = [(place + 0.5) / half * 2 for place in range(half)]
    for _ in range(5000):
        edges = [0.0, *((a + b) / 2 for a, b in pairwise(values)), math.inf]
        # The mean of a standard normal variable between two edges.
        values = [
            (normal.pdf(a) - (0.0 if b == math.inf else normal.pdf(b)))
            / ((1.0 if b == math.inf else normal.cdf(b)) - normal.cdf(a))
            for a, b in pairwise(edges)
        ]
    return torch.tensor([*(-value for value in reversed(values)), *values], dtype=torch.float64)
