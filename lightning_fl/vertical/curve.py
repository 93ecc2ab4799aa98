"""Ids as points of Curve25519 (RFC 9380), and their secret multiples (X25519)."""

from __future__ import annotations

import hashlib
import secrets

from lightning_fl.privacy.secagg.errors import ProtocolError
from lightning_fl.privacy.secagg.primitives import AgreementKey

PRIME = 2**255 - 19
A = 486662
ORDER = 2**252 + 27742317777372353535851937790883648493
"""The order of the subgroup of points; the curve has 8 times as many."""
COFACTOR = 8
POINT_BYTES = 32
FIELD_BYTES = 48


def encode_to_curve(message: bytes, tag: bytes) -> int:
    """The u-coordinate of a message's point, with the suite ``curve25519_XMD:SHA-512_ELL2_NU_``.

    Args:
        message: Any bytes.
        tag: The domain separation tag: the purpose of the point.

    Reference:
        RFC 9380, "Hashing to Elliptic Curves".
    """
    return clear_cofactor(map_to_curve(hash_to_field(message, tag)))


def hash_to_field(message: bytes, tag: bytes) -> int:
    """A field element, by ``expand_message_xmd`` with SHA-512; 48 bytes fit into one block of 64."""
    tag += len(tag).to_bytes(1, "big")
    first = hashlib.sha512(bytes(128) + message + FIELD_BYTES.to_bytes(2, "big") + b"\0" + tag).digest()
    block = hashlib.sha512(first + b"\1" + tag).digest()
    return int.from_bytes(block[:FIELD_BYTES], "big") % PRIME


def map_to_curve(element: int) -> int:
    """The u-coordinate of a field element's point, by Elligator 2."""
    u = -A * pow(1 + 2 * element * element, -1, PRIME) % PRIME  # 1 + 2 e^2 is never 0: -1/2 is not a square
    value = (u * u + A * u + 1) * u % PRIME
    return u if pow(value, (PRIME - 1) // 2, PRIME) in (0, 1) else (-u - A) % PRIME


def clear_cofactor(u: int) -> int:
    """The u-coordinate of 8 times the point."""
    x, z = u, 1
    for _ in range(3):
        # As in RFC 7748: doubling of a point given by x / z.
        plus, minus = (x + z) ** 2 % PRIME, (x - z) ** 2 % PRIME
        difference = plus - minus
        x, z = plus * minus % PRIME, difference * (minus + (A + 2) // 4 * difference) % PRIME
    return x * pow(z, -1, PRIME) % PRIME


def point_of(message: bytes, tag: bytes) -> bytes:
    """A message's point for :meth:`SecretFactor.multiply`, whose factor includes the cofactor."""
    return map_to_curve(hash_to_field(message, tag)).to_bytes(POINT_BYTES, "little")


class SecretFactor:
    """A secret factor by which points are multiplied, and its inverse.

    X25519 accepts multiples of 8 from 2^254 on, so the factor is drawn until its inverse has this form too.
    """

    def __init__(self) -> None:
        while True:
            factor = (1 << 254) + COFACTOR * secrets.randbelow(1 << 251)
            # The multiple of 8 that is the inverse modulo the order.
            inverse = pow(factor * COFACTOR, -1, ORDER) * COFACTOR
            if factor % ORDER and 1 << 254 <= inverse < 1 << 255:
                break
        self._factor = AgreementKey(factor.to_bytes(POINT_BYTES, "little"))
        self._inverse = AgreementKey(inverse.to_bytes(POINT_BYTES, "little"))

    def multiply(self, point: bytes) -> bytes:
        """The multiple of a point.

        Raises:
            ProtocolError: If the point has low order, so that its multiple would be meaningless, or is malformed.
        """
        return self._factor.agree(check_point(point))

    def undo(self, point: bytes) -> bytes:
        """Inverts :meth:`multiply`: the original point without its cofactor component."""
        return self._inverse.agree(check_point(point))


def check_point(point: bytes) -> bytes:
    """Refuses bytes that are not the canonical encoding of a u-coordinate.

    Raises:
        ProtocolError: If they are not.
    """
    if len(point) != POINT_BYTES or int.from_bytes(point, "little") >= PRIME:
        raise ProtocolError(f"{point.hex()} is not a point: expected {POINT_BYTES} bytes below 2^255 - 19.")
    return point
