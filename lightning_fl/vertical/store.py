"""An oblivious key-value store, which hides its keys: any other key returns a random value."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping

FIELD = 2**127 - 1
VALUE_BYTES = 16
MEAN_LOAD, BIN_SIZE = 16, 64
"""Average and maximum number of keys in a bin; the maximum is exceeded with a probability below 1e-15."""


def num_bins(size: int) -> int:
    """The number of bins for ``size`` keys."""
    return max(1, -(-size // MEAN_LOAD))


def encode(values: Mapping[bytes, int], bins: int) -> bytes:
    r"""Encodes values as one polynomial per bin, whose values at all other keys are uniformly random.

    .. math:: P(x) = I(x) + R(x) \prod_i (x - x_i)

    with the interpolation polynomial I of the bin's values and a random R.

    Args:
        values: Numbers below 2^127 - 1 by key; the keys have to be unpredictable.
        bins: Number of bins.

    Raises:
        ValueError: If a bin gets too many keys, which has a probability below 1e-15.

    Reference:
        Garimella et al., "Oblivious Key-Value Stores and Amplification for Private Set Intersection", CRYPTO 2021.
    """
    content: list[list[tuple[int, int]]] = [[] for _ in range(bins)]
    for key, value in values.items():
        place, x = _place(key, bins)
        content[place].append((x, value))
    if max(map(len, content)) > BIN_SIZE:
        raise ValueError("Too many ids fell into one bin, which has a probability below 1e-15. Run again.")
    return b"".join(
        coefficient.to_bytes(VALUE_BYTES, "little") for points in content for coefficient in _polynomial(points)
    )


def decode(store: bytes, key: bytes, bins: int) -> int:
    """The value of a key, or a random one."""
    place, x = _place(key, bins)
    size = BIN_SIZE * VALUE_BYTES
    part = store[place * size : (place + 1) * size]
    value = 0
    for start in range(size - VALUE_BYTES, -1, -VALUE_BYTES):
        value = (value * x + int.from_bytes(part[start : start + VALUE_BYTES], "little")) % FIELD
    return value


def num_bytes(bins: int) -> int:
    """The size of a store."""
    return bins * BIN_SIZE * VALUE_BYTES


def _place(key: bytes, bins: int) -> tuple[int, int]:
    digest = hashlib.blake2b(key, person=b"place").digest()
    return int.from_bytes(digest[:16], "little") % bins, int.from_bytes(digest[16:48], "little") % FIELD


def _polynomial(points: list[tuple[int, int]]) -> list[int]:
    """The coefficients, lowest degree first, of a random polynomial through the points."""
    # Newton's form: each step adds a multiple of the product that vanishes at the points so far.
    found, product = [0], [1]
    for x, value in points:
        factor = (value - _at(found, x)) * pow(_at(product, x), -1, FIELD) % FIELD
        found = [(a + factor * b) % FIELD for a, b in zip([*found, 0], product, strict=False)] if factor else found
        found += [0] * (len(product) - len(found))
        product = [(a - x * b) % FIELD for a, b in zip([0, *product], [*product, 0], strict=True)]
    found += [0] * (BIN_SIZE - len(found))
    for shift in range(BIN_SIZE - len(points)):
        factor = secrets.randbelow(FIELD)
        for index, coefficient in enumerate(product[: BIN_SIZE - shift]):
            found[shift + index] = (found[shift + index] + factor * coefficient) % FIELD
    return found


def _at(coefficients: list[int], x: int) -> int:
    value = 0
    for coefficient in reversed(coefficients):
        value = (value * x + coefficient) % FIELD
    return value
