"""The cryptographic primitives, all from the package ``cryptography``; no other file of secagg imports it."""

from __future__ import annotations

import functools
import hashlib
from types import SimpleNamespace
from typing import Any, NoReturn

from lightning_fl.privacy.secagg.errors import ProtocolError

KEY_BYTES = 32
SIGNATURE_BYTES = 64
SEAL_BYTES = 16
"""The bytes that sealing adds: the Poly1305 tag."""


@functools.cache
def library() -> SimpleNamespace:
    """Imports the parts of ``cryptography`` in use, on the first call.

    Raises:
        ModuleNotFoundError: If ``cryptography`` is not installed.
    """
    try:
        from cryptography import exceptions
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ed25519, x25519
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
        from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Secure aggregation needs the package `cryptography`, which is not installed. Install it with "
            "pip install 'lightning-fl[privacy]'."
        ) from error
    return SimpleNamespace(
        exceptions=exceptions,
        hashes=hashes,
        serialization=serialization,
        ed25519=ed25519,
        x25519=x25519,
        Cipher=Cipher,
        algorithms=algorithms,
        modes=modes,
        ChaCha20Poly1305=ChaCha20Poly1305,
        HKDF=HKDF,
    )


class Secret:
    """Base of objects that hold a secret: their repr hides it, and they refuse to be copied or pickled."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__}, secret>"

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(f"A {type(self).__name__} holds a secret and is never copied or pickled.")


class SigningKey(Secret):
    """An Ed25519 key, a participant's identity.

    Args:
        private: Its 32 bytes; None makes a new key from the operating system's randomness.
    """

    def __init__(self, private: bytes | None = None) -> None:
        ed25519 = library().ed25519.Ed25519PrivateKey
        self._key = ed25519.generate() if private is None else ed25519.from_private_bytes(private)
        self.public: bytes = self._key.public_key().public_bytes_raw()

    def sign(self, data: bytes) -> bytes:
        """Returns the signature, 64 bytes."""
        return self._key.sign(data)

    def private_bytes(self) -> bytes:
        """Returns the 32 secret bytes, to be written to a key file."""
        return self._key.private_bytes_raw()


class AgreementKey(Secret):
    """An X25519 key, which agrees on a secret with another one.

    Args:
        private: Its 32 bytes; None makes a new key from the operating system's randomness.
    """

    def __init__(self, private: bytes | None = None) -> None:
        x25519 = library().x25519.X25519PrivateKey
        self._key = x25519.generate() if private is None else x25519.from_private_bytes(private)
        self.public: bytes = self._key.public_key().public_bytes_raw()

    def agree(self, public: bytes) -> bytes:
        """Returns the secret that only the owners of the two keys know.

        Raises:
            ProtocolError: If the other key has low order, so that the secret would be known to everybody.
        """
        try:
            return self._key.exchange(library().x25519.X25519PublicKey.from_public_bytes(public))
        except ValueError as error:
            raise ProtocolError(f"The X25519 key {public.hex()} is of low order or not a key.") from error

    def private_bytes(self) -> bytes:
        """Returns the 32 secret bytes, to be split into shares for the other participants."""
        return self._key.private_bytes_raw()


def verify(public: bytes, signature: bytes, data: bytes, whose: str) -> None:
    """Checks an Ed25519 signature.

    Raises:
        ProtocolError: If the owner of the key has not signed the data.
    """
    if not _is_signed(public, signature, data):
        raise ProtocolError(f"The signature of {whose} does not belong to its message.")


@functools.lru_cache(maxsize=1024)  # simulated clients of one process check the same signatures
def _is_signed(public: bytes, signature: bytes, data: bytes) -> bool:
    lib = library()
    try:
        lib.ed25519.Ed25519PublicKey.from_public_bytes(public).verify(signature, data)
    except (lib.exceptions.InvalidSignature, ValueError):
        return False
    return True


def derive(secret: bytes, salt: bytes, info: bytes) -> bytes:
    """Derives a 32-byte key by HKDF-SHA256."""
    lib = library()
    return lib.HKDF(algorithm=lib.hashes.SHA256(), length=KEY_BYTES, salt=salt, info=info).derive(secret)


def digest(*parts: bytes | memoryview) -> bytes:
    """Returns the SHA-256 of the parts, each preceded by its length, so that no two lists have the same input."""
    content = hashlib.sha256()
    for part in parts:
        content.update(len(part).to_bytes(8, "little"))
        content.update(part)
    return content.digest()


def keystream(key: bytes) -> Any:
    """Returns an AES-256-CTR encryptor that starts at counter 0; a key must be used for one stream only."""
    lib = library()
    return lib.Cipher(lib.algorithms.AES(key), lib.modes.CTR(bytes(16))).encryptor()


def seal(key: bytes, text: bytes, header: bytes) -> bytes:
    """Encrypts with ChaCha20-Poly1305. A key must seal only one text, so the nonce can be 0."""
    return library().ChaCha20Poly1305(key).encrypt(bytes(12), text, header)


def unseal(key: bytes, sealed: bytes, header: bytes) -> bytes:
    """Decrypts and authenticates what :func:`seal` returned.

    Raises:
        ProtocolError: If the text or header was changed, or sealed for somebody else.
    """
    lib = library()
    try:
        return lib.ChaCha20Poly1305(key).decrypt(bytes(12), sealed, header)
    except lib.exceptions.InvalidTag as error:
        raise ProtocolError("A sealed share has been changed in transit, or was meant for somebody else.") from error
