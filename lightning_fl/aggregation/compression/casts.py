"""Fewer bits per number: half precision, and 8 or 4 bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

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
class Cast(Compressor):
    """Half precision: 2 bytes per number.

    ``"float16"`` holds magnitudes up to 65,504; larger ones are clamped.

    Args:
        dtype: ``"bfloat16"`` or ``"float16"``. Default ``"bfloat16"``.

    Raises:
        ValueError: If ``dtype`` is neither.
    """

    is_idempotent: ClassVar[bool] = True
    dtype: Literal["bfloat16", "float16"] = "bfloat16"

    def __post_init__(self) -> None:
        if self.dtype not in ("bfloat16", "float16"):
            raise ValueError(f"dtype={self.dtype!r} is not known; expected 'bfloat16' or 'float16'.")

    def num_bytes(self, size: int) -> int:
        return 2 * size

    def encode(self, vector: Tensor, generator: torch.Generator) -> Tensor:
        dtype = getattr(torch, self.dtype)
        largest = torch.finfo(dtype).max
        return as_bytes(vector.clamp(-largest, largest).to(dtype))

    def decode(self, payload: Tensor, size: int) -> Tensor:
        self.check(payload, size)
        return from_bytes(payload, getattr(torch, self.dtype)).float()


@dataclass(frozen=True)
class Quantize(Compressor):
    r"""Uniform quantization with stochastic rounding, which is unbiased.

    .. math::
        q_j = \Delta \lfloor v_j / \Delta + u_j \rfloor, \qquad \Delta = \frac{\max_j |v_j|}{2^{b - 1} - 1},
        \qquad u_j \sim U[0, 1)

    Args:
        bits: Bits :math:`b` per number, 8 or 4. Default 8.

    Raises:
        ValueError: If ``bits`` is neither.
    """

    is_idempotent: ClassVar[bool] = True
    bits: int = 8

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ValueError(f"bits={self.bits} must be 8 or 4.")

    def num_bytes(self, size: int) -> int:
        return 4 + packed_size(size, self.bits)

    def encode(self, vector: Tensor, generator: torch.Generator) -> Tensor:
        top, vector = (1 << (self.bits - 1)) - 1, vector.detach().cpu().double()
        step = (vector.abs().max() / top).float() if len(vector) else torch.zeros(())
        places = vector / step.double() if step > 0 else torch.zeros_like(vector)
        whole = round_at_random(places, generator).clamp(-top, top)
        return torch.cat([as_bytes(step), pack_bits(whole + top, self.bits)])

    def decode(self, payload: Tensor, size: int) -> Tensor:
        self.check(payload, size)
        top = (1 << (self.bits - 1)) - 1
        return from_bytes(payload[:4], torch.float32) * (unpack_bits(payload[4:], self.bits, size) - top)


def round_at_random(values: Tensor, generator: torch.Generator) -> Tensor:
    """Rounds stochastically: up with a probability of the fractional part, else down; integers are unchanged."""
    nearest = values.round()
    drawn = (values + torch.rand(values.shape, generator=generator, dtype=values.dtype)).floor()
    # Decoded values differ from integers by rounding errors.
    return torch.where((values - nearest).abs() < 1e-5, nearest, drawn)
