"""Shamir's secret sharing of 32-byte secrets."""

from __future__ import annotations

import secrets
from collections.abc import Mapping

PRIME = 2**256 + 297
"""The smallest prime above 2^256, so that every 32-byte secret is an element of the field."""
SHARE_BYTES = 33


def split(secret: bytes, numbers: list[int], threshold: int) -> dict[int, bytes]:
    r"""Splits a secret so that any ``threshold`` shares reconstruct it and fewer reveal nothing.

    .. math:: f(x) = s + a_1 x + \dots + a_{t-1} x^{t-1} \bmod p, \qquad \text{share}_i = f(i)

    Args:
        secret: 32 bytes.
        numbers: The holders' numbers, distinct and not 0, where the polynomial is the secret itself.
        threshold: Shares needed, at most the number of holders.

    Raises:
        ValueError: If a number is 0 or repeated, or the threshold does not fit.
    """
    if len(secret) != 32 or not 1 <= threshold <= len(numbers):
        raise ValueError(f"Can't share {len(secret)} bytes among {len(numbers)} with threshold {threshold}.")
    _check_numbers(numbers)
    # Uniform over the whole field: otherwise fewer shares than the threshold would leak information about the secret.
    coefficients = [int.from_bytes(secret, "little"), *(secrets.randbelow(PRIME) for _ in range(threshold - 1))]
    return {number: _evaluate(coefficients, number).to_bytes(SHARE_BYTES, "little") for number in numbers}


def combine(shares: Mapping[int, bytes]) -> bytes:
    """Reconstructs the secret by interpolation at 0, from as many shares as the threshold.

    Raises:
        ValueError: If a share or the result is out of range, so the shares do not belong together.
    """
    numbers = list(shares)
    _check_numbers(numbers)
    values = [int.from_bytes(share, "little") for share in shares.values()]
    if any(len(share) != SHARE_BYTES for share in shares.values()) or any(value >= PRIME for value in values):
        raise ValueError("A share is not a number below the prime.")
    total = 0
    for i, value in zip(numbers, values, strict=True):
        numerator, denominator = 1, 1
        for j in numbers:
            if j != i:
                numerator = numerator * j % PRIME
                denominator = denominator * (j - i) % PRIME
        total += value * numerator * pow(denominator, -1, PRIME)
    secret = total % PRIME
    if secret >= 1 << 256:
        raise ValueError("The shares do not belong together: they do not yield a 32-byte secret.")
    return secret.to_bytes(32, "little")


def _evaluate(coefficients: list[int], x: int) -> int:
    value = 0
    for coefficient in reversed(coefficients):
        value = (value * x + coefficient) % PRIME
    return value


def _check_numbers(numbers: list[int]) -> None:
    if len(set(numbers)) != len(numbers) or not all(0 < number < PRIME for number in numbers):
        raise ValueError(f"The holders' numbers must be different and positive, found {numbers[:8]}.")
