"""Real numbers as integers with exact sums: coordinates by stochastic rounding, scalars as limbs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_fl.privacy.secagg.masks import BLOCK_BYTES, Keystream

DTYPES = {32: torch.int32, 64: torch.int64}
"""Integer types by the bits of their modulus."""
MIN_BITS = 12
MAX_BITS = 44  # of float64's 53, which leaves nine for the fraction that stochastic rounding decides by
MAX_CLIENTS = 1 << 15

LIMB_BITS = 15
NUM_LIMBS = 6
FRACTION_BITS = 45
MAX_SCALAR = 2.0**43
_MASK = (1 << LIMB_BITS) - 1


@dataclass(frozen=True)
class Quantizer:
    r"""Clips a coordinate to ``[-clip, clip]`` and rounds it stochastically to one of :math:`2^{b+1} - 1` levels.

    .. math::
        q = \lfloor x / s \rfloor + \mathrm{Bernoulli}(x / s - \lfloor x / s \rfloor), \qquad
        s = \mathrm{clip} / (2^b - 1)

    ``b`` is the largest for which the sum over all clients fits the modulus, so a sum of n clients is within
    :math:`n \, \mathrm{clip} / (2^b - 1)` of the exact one. The rounding's randomness comes from AES-256-CTR with a key
    from the operating system. Its only bias is that of its arithmetic, with 32-bit numbers in float64: of the order of
    :math:`2^{-32} + 2^{b-53}` levels, which at b = 44 is 1/512.

    Args:
        num_clients: The largest number of clients in a sum.
        clip: The largest magnitude of a coordinate.
        modulus_bits: 32 or 64.

    Raises:
        ValueError: If fewer than 12 bits are left, or the numbers are out of range.
    """

    num_clients: int
    clip: float
    modulus_bits: int = 32

    def __post_init__(self) -> None:
        if self.modulus_bits not in DTYPES:
            raise ValueError(f"modulus_bits={self.modulus_bits} must be 32 or 64.")
        if not (math.isfinite(self.clip) and self.clip > 0):
            raise ValueError(f"clip={self.clip} must be a positive number.")
        if not 1 <= self.num_clients <= MAX_CLIENTS or self.bits < MIN_BITS:
            raise ValueError(
                f"A sum over {self.num_clients} clients would leave {self.bits} bits for a coordinate in integers of "
                f"{self.modulus_bits} bits. At least {MIN_BITS} bits are needed, and at most {MAX_CLIENTS} clients. "
                "Use modulus_bits=64, or fewer clients in a round."
            )

    @property
    def bits(self) -> int:
        """Bits of a coordinate's magnitude: the largest b with ``num_clients * (2^b - 1) < 2^(modulus_bits - 1)``."""
        max_sum = ((1 << (self.modulus_bits - 1)) - 1) // max(self.num_clients, 1)
        return min((max_sum + 1).bit_length() - 1, MAX_BITS)

    @property
    def step(self) -> float:
        """Distance between two levels."""
        return self.clip / ((1 << self.bits) - 1)

    def add(self, vector: Tensor, values: Tensor, factor: float, noise: Keystream) -> bool:
        """Adds the levels of ``factor * values`` to ``vector`` in place.

        Args:
            vector: int32 or int64, shape ``[d]``.
            values: Floating point, shape ``[d]``, finite; clipped before they are multiplied.
            factor: The client's weight relative to the largest weight, between 0 and 1.
            noise: Source of the rounding's randomness.

        Returns:
            Whether a coordinate was clipped.
        """
        limit = (1 << self.bits) - 1
        clipped = False
        block = BLOCK_BYTES // 4
        for target, part in zip(vector.split(block), values.split(block), strict=True) if len(values) else ():
            exact = part.double()
            clipped = clipped or bool(exact.abs().max() > self.clip)
            exact = exact.clamp(-self.clip, self.clip).mul_(factor / self.step)
            # The integers are signed, so u is uniform on [0, 1), and floor(x + u) rounds up with probability frac(x).
            uniform = noise.integers(len(part)).to(exact.device).double().mul_(2.0**-32).add_(0.5)
            # Clamped, because adding u to the largest level may round up to the next one in float64, and the sum of all
            # clients would then leave the modulus.
            target.add_(exact.add_(uniform).floor_().clamp_(-limit, limit).to(target.dtype))
        return clipped

    def decode(self, vector: Tensor) -> Tensor:
        """Returns the sum, as float64, that the summed levels represent."""
        return vector.double() * self.step


def to_limbs(scalars: Tensor, dtype: torch.dtype) -> Tensor:
    """Splits numbers into limbs of 15 bits each, in steps of 2^-45, so that sums over up to 32768 clients are exact.

    15 bits and 2^15 clients stay below 2^31, so no limb overflows an int32.

    Args:
        scalars: float64, shape ``[k]``, of magnitude below 2^43.
        dtype: int32 or int64.

    Returns:
        Shape ``[6 * k]``: for each number three limbs of its fraction, then three of its integer part.

    Raises:
        ValueError: If a number is out of range or not finite.
    """
    if not bool((scalars.abs() < MAX_SCALAR).all()):
        worst = scalars.abs().max().item()
        raise ValueError(f"The number {worst:g} is not below {MAX_SCALAR:g}, the largest in a secure sum.")
    whole = scalars.floor()
    fraction = (scalars - whole).mul(2.0**FRACTION_BITS).round().long()
    parts = torch.stack([fraction, whole.long()], dim=1)
    # The highest limb is not masked: it holds the sign of the integer part, and a fraction that was rounded up to 1.
    limbs = torch.stack([parts & _MASK, (parts >> LIMB_BITS) & _MASK, parts >> (2 * LIMB_BITS)], dim=2)
    return limbs.reshape(-1).to(dtype)


def from_limbs(vector: Tensor) -> Tensor:
    """Returns the numbers that summed limbs represent, float64 of shape ``[len(vector) / 6]``."""
    limbs = vector.long().reshape(-1, 2, NUM_LIMBS // 2)
    parts = limbs[..., 0] + (limbs[..., 1] << LIMB_BITS) + (limbs[..., 2] << (2 * LIMB_BITS))
    return parts[:, 1].double() + parts[:, 0].double() * 2.0**-FRACTION_BITS
