"""Real numbers as integers whose sums are exact: coordinates by stochastic rounding, figures as limbs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_fl.privacy.secagg.masks import BLOCK_BYTES, Keystream

WORDS = {32: torch.int32, 64: torch.int64}
"""Word types by the bits of their modulus."""
MIN_BITS = 12
MAX_BITS = 44  # float64 has 53: nine are left for the fraction that is rounded
MAX_CLIENTS = 1 << 15

LIMB_BITS = 15
NUM_LIMBS = 6
FRACTION_BITS = 45
MAX_FIGURE = 2.0**43
_MASK = (1 << LIMB_BITS) - 1


@dataclass(frozen=True)
class Quantizer:
    r"""Clips a coordinate to ``[-clip, clip]`` and rounds it at random to one of :math:`2^{b+1} - 1` levels.

    .. math::
        q = \lfloor x / s \rfloor + \mathrm{Bernoulli}(x / s - \lfloor x / s \rfloor), \qquad
        s = \mathrm{clip} / (2^b - 1)

    ``b`` is the largest with which the sum over all clients stays in the modulus, so a sum of n clients is within
    :math:`n \, \mathrm{clip} / (2^b - 1)` of the exact one. The rounding's randomness comes from AES-256-CTR under a
    key of the operating system. It has no bias but that of its arithmetic, with numbers of 32 bits in float64: of the
    order of :math:`2^{-32} + 2^{b-53}` levels, which at b = 44 is 1/512.

    Args:
        num_clients: The most clients that add to a sum.
        clip: The largest magnitude of a coordinate.
        modulus_bits: 32 or 64.

    Raises:
        ValueError: If fewer than 12 bits are left, or the numbers are out of range.
    """

    num_clients: int
    clip: float
    modulus_bits: int = 32

    def __post_init__(self) -> None:
        if self.modulus_bits not in WORDS:
            raise ValueError(f"modulus_bits={self.modulus_bits} must be 32 or 64.")
        if not (math.isfinite(self.clip) and self.clip > 0):
            raise ValueError(f"clip={self.clip} must be a positive number.")
        if not 1 <= self.num_clients <= MAX_CLIENTS or self.bits < MIN_BITS:
            raise ValueError(
                f"The sum over {self.num_clients} clients would leave {self.bits} bits a coordinate in words of "
                f"{self.modulus_bits} bits; at least {MIN_BITS} are needed, and at most {MAX_CLIENTS} clients. Take "
                "modulus_bits=64, or fewer clients in a round."
            )

    @property
    def bits(self) -> int:
        """Bits of a coordinate's magnitude: the largest b with ``num_clients * (2^b - 1) < 2^(modulus_bits - 1)``."""
        most = ((1 << (self.modulus_bits - 1)) - 1) // max(self.num_clients, 1)
        return min((most + 1).bit_length() - 1, MAX_BITS)

    @property
    def step(self) -> float:
        """Distance of two levels."""
        return self.clip / ((1 << self.bits) - 1)

    def add(self, words: Tensor, values: Tensor, factor: float, noise: Keystream) -> bool:
        """Adds the levels of ``factor * values`` to words in place.

        Args:
            words: int32 or int64, shape ``[d]``.
            values: Floating point, shape ``[d]``, finite; they are clipped before they are multiplied.
            factor: Between 0 and 1: the client's share of the largest weight.
            noise: Where the rounding's randomness comes from.

        Returns:
            Whether a coordinate was clipped.
        """
        limit = (1 << self.bits) - 1
        clipped = False
        block = BLOCK_BYTES // 4
        for target, part in zip(words.split(block), values.split(block), strict=True) if len(values) else ():
            exact = part.double()
            clipped = clipped or bool(exact.abs().max() > self.clip)
            exact = exact.clamp(-self.clip, self.clip).mul_(factor / self.step)
            uniform = noise.words(len(part)).to(exact.device).double().mul_(2.0**-32).add_(0.5)
            target.add_(exact.add_(uniform).floor_().clamp_(-limit, limit).to(target.dtype))
        return clipped

    def decode(self, words: Tensor) -> Tensor:
        """The sum, as float64, that summed levels stand for."""
        return words.double() * self.step


def to_limbs(figures: Tensor, dtype: torch.dtype) -> Tensor:
    """Numbers as words of 15 bits each, in steps of 2^-45, so that sums over up to 32768 clients are exact.

    Args:
        figures: float64, shape ``[k]``, of magnitude below 2^43.
        dtype: int32 or int64.

    Returns:
        Shape ``[6 * k]``: of each number three words of its fraction, then three of its whole part.

    Raises:
        ValueError: If a number is out of range or not finite.
    """
    if not bool((figures.abs() < MAX_FIGURE).all()):
        worst = figures.abs().max().item()
        raise ValueError(f"The figure {worst:g} is not below {MAX_FIGURE:g}, the largest in a secure sum.")
    whole = figures.floor()
    fraction = (figures - whole).mul(2.0**FRACTION_BITS).round().long()
    parts = torch.stack([fraction, whole.long()], dim=1)
    limbs = torch.stack([parts & _MASK, (parts >> LIMB_BITS) & _MASK, parts >> (2 * LIMB_BITS)], dim=2)
    return limbs.reshape(-1).to(dtype)


def from_limbs(words: Tensor) -> Tensor:
    """The numbers behind summed limbs, float64 of shape ``[len(words) / 6]``."""
    limbs = words.long().reshape(-1, 2, NUM_LIMBS // 2)
    parts = limbs[..., 0] + (limbs[..., 1] << LIMB_BITS) + (limbs[..., 2] << (2 * LIMB_BITS))
    return parts[:, 1].double() + parts[:, 0].double() * 2.0**-FRACTION_BITS
