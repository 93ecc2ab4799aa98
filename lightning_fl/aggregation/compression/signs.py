"""One scale and few bits per number: the scaled sign, and QSGD."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_fl.aggregation.compression.casts import round_at_random
from lightning_fl.aggregation.compression.compressor import (
    Compressor,
    as_bytes,
    from_bytes,
    pack_bits,
    packed_size,
    unpack_bits,
)


@dataclass(frozen=True)
class ScaledSign(Compressor):
    r"""The signs times the mean magnitude: 1 bit per number. The sign of 0 is plus.

    .. math::
        q_j = \operatorname{sign}(v_j) \, \lVert v \rVert_1 / d

    It is biased, so it needs error feedback.

    Reference:
        Karimireddy et al., "Error Feedback Fixes SignSGD and other Gradient Compression Schemes", ICML 2019.
    """

    is_idempotent: ClassVar[bool] = True
    shortens: ClassVar[bool] = True

    def num_bytes(self, size: int) -> int:
        return 4 + packed_size(size, 1)

    def encode(self, vector: Tensor, generator: torch.Generator) -> Tensor:
        vector = vector.detach().cpu()
        scale = vector.double().abs().mean().float() if len(vector) else torch.zeros(())
        return torch.cat([as_bytes(scale), pack_bits(vector >= 0, 1)])

    def decode(self, payload: Tensor, size: int) -> Tensor:
        self.check(payload, size)
        return from_bytes(payload[:4], torch.float32) * (2 * unpack_bits(payload[4:], 1, size) - 1)


@dataclass(frozen=True)
class QSGD(Compressor):
    r"""QSGD: the norm, and for each number its sign and a level from 0 to :math:`s`, rounded without bias.

    .. math::
        q_j = \lVert v \rVert_2 \operatorname{sign}(v_j) \, l_j / s, \qquad \mathbb{E} \, l_j = s |v_j| / \lVert v
        \rVert_2

    Args:
        levels: Levels :math:`s`, from 1 to 127. Up to 7 take 4 bits per number, more take 8. Default 7.

    Raises:
        ValueError: If ``levels`` is out of range.

    Reference:
        Alistarh et al., "QSGD: Communication-Efficient SGD via Gradient Quantization and Encoding", NeurIPS 2017.
    """

    levels: int = 7

    def __post_init__(self) -> None:
        if not 1 <= self.levels <= 127:
            raise ValueError(f"levels={self.levels} must be from 1 to 127.")

    @property
    def bits(self) -> int:
        """Bits per number."""
        return 4 if self.levels <= 7 else 8

    def num_bytes(self, size: int) -> int:
        return 4 + packed_size(size, self.bits)

    def encode(self, vector: Tensor, generator: torch.Generator) -> Tensor:
        vector = vector.detach().cpu().double()
        norm = torch.linalg.vector_norm(vector)
        places = self.levels * vector.abs() / norm if norm > 0 else torch.zeros_like(vector)
        level = round_at_random(places, generator).clamp(0, self.levels) * vector.sign()
        return torch.cat([as_bytes(norm.float()), pack_bits(level + self.levels, self.bits)])

    def decode(self, payload: Tensor, size: int) -> Tensor:
        self.check(payload, size)
        level = unpack_bits(payload[4:], self.bits, size) - self.levels
        return from_bytes(payload[:4], torch.float32) * level / self.levels
