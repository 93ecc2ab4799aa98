"""The messages of secure aggregation: fixed binary formats, little-endian, each with exactly one encoding.

A message is ``LFSA``, the version, its kind, the length of its content, and the content. Numbers are 4 bytes. Lists
start with their length and are sorted by the participants' numbers. One encoding per message means that a signature or
hash over the bytes covers the meaning, and that every byte received has been checked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeVar

from lightning_fl.privacy.secagg.errors import ProtocolError
from lightning_fl.privacy.secagg.primitives import KEY_BYTES, SEAL_BYTES, SIGNATURE_BYTES, digest
from lightning_fl.privacy.secagg.shamir import SHARE_BYTES

MAGIC = b"LFSA"
VERSION = 2
HEADER_BYTES = len(MAGIC) + 2 + 8
SEALED_BYTES = 2 * SHARE_BYTES + SEAL_BYTES
MAX_NUMBER = (1 << 31) - 1

Item = TypeVar("Item")


class Reader:
    """Reads the fields of a message one after the other.

    Args:
        data: The message.
        kind: The expected kind.

    Raises:
        ProtocolError: If it is no such message. All methods raise it.
    """

    def __init__(self, data: bytes, kind: int) -> None:
        self._data = memoryview(data)
        self._position = 0
        header = bytes(self._take(HEADER_BYTES))
        if header[: len(MAGIC) + 2] != MAGIC + bytes([VERSION, kind]):
            raise ProtocolError(f"Expected a message of kind {kind} in version {VERSION}, found {header[:6].hex()}.")
        if int.from_bytes(header[6:], "little") != len(data) - HEADER_BYTES:
            raise ProtocolError(f"A message of kind {kind} has {len(data)} bytes, not as many as its header says.")

    def number(self) -> int:
        """Reads a whole number."""
        value = int.from_bytes(self._take(4), "little")
        if value > MAX_NUMBER:
            raise ProtocolError(f"A message holds the number {value}; none is above {MAX_NUMBER}.")
        return value

    def raw(self, size: int) -> bytes:
        """Reads ``size`` bytes."""
        return bytes(self._take(size))

    def rest(self) -> memoryview:
        """Reads all bytes that are left."""
        return self._take(len(self._data) - self._position)

    def entries(self, read: Callable[[], Item]) -> dict[int, Item]:
        """Reads a list by participant, in rising order."""
        found: dict[int, Item] = {}
        last = 0
        for _ in range(self.number()):
            number = self.number()
            if number <= last:
                raise ProtocolError(f"A list names participant {number} after {last}: twice, or out of order.")
            found[number], last = read(), number
        return found

    def end(self) -> None:
        """Checks that no byte is left."""
        if self._position != len(self._data):
            raise ProtocolError(f"A message has {len(self._data) - self._position} bytes too many.")

    def _take(self, size: int) -> memoryview:
        start, self._position = self._position, self._position + size
        if self._position > len(self._data):
            raise ProtocolError(f"A message ends after {len(self._data)} bytes, in the middle of a field.")
        return self._data[start : self._position]


def _message(kind: int, *parts: bytes | memoryview) -> bytes:
    content = b"".join(parts)
    return MAGIC + bytes([VERSION, kind]) + len(content).to_bytes(8, "little") + content


def _number(value: int) -> bytes:
    return value.to_bytes(4, "little")


def _entries(entries: Mapping[int, bytes]) -> bytes:
    return _number(len(entries)) + b"".join(_number(number) + entries[number] for number in sorted(entries))


@dataclass(frozen=True)
class SessionParams:
    """The parameters of one secure sum, on which all participants agree; bound into every key and signature.

    Args:
        session: 32 bytes to which every participant has contributed.
        model: Hash of the global model from which all have trained.
        settings: Hash of the layout and value ranges of the vector.
        round: Number of the round.
        attempt: How often the sum of this round was tried before.
        num_clients: Number of clients in the round; determines quantization and threshold.
        threshold: Minimum number of clients that must stay until the sum is revealed.
    """

    session: bytes
    model: bytes
    settings: bytes
    round: int
    attempt: int
    num_clients: int
    threshold: int

    SIZE: ClassVar[int] = 3 * 32 + 4 * 4

    def encode(self) -> bytes:
        """Encodes the parameters as a part of a message."""
        numbers = (self.round, self.attempt, self.num_clients, self.threshold)
        return self.session + self.model + self.settings + b"".join(map(_number, numbers))

    @classmethod
    def read(cls, reader: Reader) -> SessionParams:
        """Decodes the parameters at the reader's position."""
        session, model, settings = (reader.raw(32) for _ in range(3))
        round, attempt, num_clients, threshold = (reader.number() for _ in range(4))
        return cls(session, model, settings, round, attempt, num_clients, threshold)


@dataclass(frozen=True)
class KeyAdvertisement:
    """A participant's keys for one secure sum, signed by its identity.

    Args:
        number: The participant's number in the round, from 1.
        identity: Its Ed25519 key.
        mask_key: X25519, for the masks.
        channel_key: X25519, for sealed shares; zeros if none are sent.
        params: The parameters it agreed to.
        has_update: Whether it adds an update or scalars to the sum, rather than zeros.
        signature: Over everything above.
    """

    number: int
    identity: bytes
    mask_key: bytes
    channel_key: bytes
    params: SessionParams
    has_update: bool = True
    signature: bytes = b""

    KIND: ClassVar[int] = 1

    @property
    def signed(self) -> bytes:
        """The bytes that are signed."""
        keys = self.identity + self.mask_key + self.channel_key
        return (
            b"lightning_fl secagg advert"
            + _number(self.number)
            + keys
            + self.params.encode()
            + bytes([self.has_update])
        )

    def encode(self) -> bytes:
        """Encodes the message."""
        keys = self.identity + self.mask_key + self.channel_key
        has_update = bytes([self.has_update])
        return _message(self.KIND, _number(self.number), keys, self.params.encode(), has_update, self.signature)

    @classmethod
    def decode(cls, data: bytes) -> KeyAdvertisement:
        """Decodes what :meth:`encode` returned."""
        reader = Reader(data, cls.KIND)
        number = reader.number()
        identity, mask_key, channel_key = (reader.raw(KEY_BYTES) for _ in range(3))
        params, has_update, signature = SessionParams.read(reader), reader.raw(1), reader.raw(SIGNATURE_BYTES)
        reader.end()
        if has_update not in (b"\0", b"\1"):
            raise ProtocolError(
                f"A key advertisement says {has_update.hex()} for whether it has an update; expected 00 or 01."
            )
        return cls(number, identity, mask_key, channel_key, params, has_update == b"\1", signature)


ADVERTISEMENT_BYTES = HEADER_BYTES + 4 + 3 * KEY_BYTES + SessionParams.SIZE + 1 + SIGNATURE_BYTES


@dataclass(frozen=True)
class Roster:
    """All key advertisements, sent to all participants."""

    advertisements: Mapping[int, KeyAdvertisement]

    KIND: ClassVar[int] = 2

    def encode(self) -> bytes:
        """Encodes the message."""
        return _message(
            self.KIND,
            _entries({number: advertisement.encode() for number, advertisement in self.advertisements.items()}),
        )

    @classmethod
    def decode(cls, data: bytes) -> Roster:
        """Decodes what :meth:`encode` returned."""
        reader = Reader(data, cls.KIND)
        advertisements = reader.entries(lambda: KeyAdvertisement.decode(reader.raw(ADVERTISEMENT_BYTES)))
        reader.end()
        wrong = [number for number, advertisement in advertisements.items() if advertisement.number != number]
        if wrong:
            raise ProtocolError(
                f"The roster lists the key advertisement of {advertisements[wrong[0]].number} as that of {wrong[0]}."
            )
        return cls(advertisements)

    @property
    def digest(self) -> bytes:
        """A hash of the participants and their keys."""
        return digest(self.encode())


@dataclass(frozen=True)
class Shares:
    """Sealed shares: from one participant by recipient, or to one participant by sender.

    Args:
        number: The participant that sends or receives them.
        sealed: The sealed shares by the other participant's number.
    """

    number: int
    sealed: Mapping[int, bytes]

    KIND: ClassVar[int] = 3

    def encode(self) -> bytes:
        """Encodes the message."""
        return _message(self.KIND, _number(self.number), _entries(self.sealed))

    @classmethod
    def decode(cls, data: bytes) -> Shares:
        """Decodes what :meth:`encode` returned."""
        reader = Reader(data, cls.KIND)
        shares = cls(reader.number(), reader.entries(lambda: reader.raw(SEALED_BYTES)))
        reader.end()
        return shares


@dataclass(frozen=True)
class MaskedVector:
    """A participant's masked vector.

    Args:
        number: The participant.
        vector: Its elements as little-endian bytes.
    """

    number: int
    vector: bytes | memoryview

    KIND: ClassVar[int] = 4

    def encode(self) -> bytes:
        """Encodes the message."""
        return _message(self.KIND, _number(self.number), self.vector)

    @classmethod
    def decode(cls, data: bytes, num_bytes: int) -> MaskedVector:
        """Decodes what :meth:`encode` returned; the vector must have ``num_bytes`` bytes."""
        reader = Reader(data, cls.KIND)
        number, vector = reader.number(), reader.rest()
        if len(vector) != num_bytes:
            raise ProtocolError(f"Participant {number} sent a vector of {len(vector)} bytes, expected {num_bytes}.")
        return cls(number, vector)


@dataclass(frozen=True)
class Survivors:
    """The numbers of the clients whose vectors have arrived."""

    numbers: Sequence[int]

    KIND: ClassVar[int] = 5

    def encode(self) -> bytes:
        """Encodes the message."""
        return _message(self.KIND, _entries(dict.fromkeys(self.numbers, b"")))

    @classmethod
    def decode(cls, data: bytes) -> Survivors:
        """Decodes what :meth:`encode` returned."""
        reader = Reader(data, cls.KIND)
        numbers = list(reader.entries(lambda: None))
        reader.end()
        return cls(numbers)

    def signed(self, context: bytes) -> bytes:
        """The bytes that participants sign, to prove to each other that they received the same list."""
        return b"lightning_fl secagg survivors" + context + self.encode()


@dataclass(frozen=True)
class Signatures:
    """Signatures over the list of survivors, by participant."""

    by_number: Mapping[int, bytes]

    KIND: ClassVar[int] = 6

    def encode(self) -> bytes:
        """Encodes the message."""
        return _message(self.KIND, _entries(self.by_number))

    @classmethod
    def decode(cls, data: bytes) -> Signatures:
        """Decodes what :meth:`encode` returned."""
        reader = Reader(data, cls.KIND)
        signatures = cls(reader.entries(lambda: reader.raw(SIGNATURE_BYTES)))
        reader.end()
        return signatures


@dataclass(frozen=True)
class Unmasking:
    """One participant's shares of the survivors' self-masks and of the dropped clients' mask keys.

    Args:
        number: The participant that answers.
        self_masks: Shares by survivor.
        mask_keys: Shares by dropped client.
    """

    number: int
    self_masks: Mapping[int, bytes]
    mask_keys: Mapping[int, bytes]

    KIND: ClassVar[int] = 7

    def encode(self) -> bytes:
        """Encodes the message."""
        return _message(self.KIND, _number(self.number), _entries(self.self_masks), _entries(self.mask_keys))

    @classmethod
    def decode(cls, data: bytes) -> Unmasking:
        """Decodes what :meth:`encode` returned."""
        reader = Reader(data, cls.KIND)
        number = reader.number()
        self_masks, mask_keys = (reader.entries(lambda: reader.raw(SHARE_BYTES)) for _ in range(2))
        reader.end()
        return cls(number, self_masks, mask_keys)
