"""What a participant does in every protocol: shows its keys, checks those of the others, derives keys with each."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from lightning_fl.privacy.secagg.errors import ProtocolError, SecureAggregationError
from lightning_fl.privacy.secagg.messages import Advert, Roster, Terms
from lightning_fl.privacy.secagg.primitives import KEY_BYTES, AgreementKey, Secret, SigningKey, derive, digest, verify

MIN_CLIENTS = 3
"""With two, each learns the other's update by taking its own off the sum."""

Trusted = Collection[bytes] | None
"""The identities that may take part; None in simulations, whose identities are made for the occasion."""


def two_thirds(num_clients: int) -> int:
    """The threshold floor(2n/3) + 1, with which no two disjoint halves can both be told a sum."""
    return 2 * num_clients // 3 + 1


@dataclass(frozen=True, repr=False)
class Participant(Secret):
    """One client's identity and its keys for one secure sum.

    Args:
        number: Its number in the round, from 1.
        identity: Who it is.
        terms: What it agrees to.
        trusted: Whom it sums with.
        mask_key: For the masks; made for this sum only.
        channel_key: For sealed shares; None where none are sent.
        has_update: Whether it puts more than zeros into the sum.
    """

    number: int
    identity: SigningKey
    terms: Terms
    trusted: Trusted
    mask_key: AgreementKey
    channel_key: AgreementKey | None = None
    has_update: bool = True

    def advert(self) -> Advert:
        """Its keys, signed."""
        channel = bytes(KEY_BYTES) if self.channel_key is None else self.channel_key.public
        advert = Advert(self.number, self.identity.public, self.mask_key.public, channel, self.terms, self.has_update)
        return replace(advert, signature=self.identity.sign(advert.signed))

    def check(self, roster: Roster, minimum: int) -> None:
        """Makes sure that the others are who they should be and have agreed to the same.

        Args:
            roster: What came as the list of participants.
            minimum: How many there must be.

        Raises:
            ProtocolError: If one is not trusted, not itself, listed twice, or this participant is not as it is.
            SecureAggregationError: If they are too few, or start from different models or settings.
        """
        adverts = roster.adverts
        own = adverts.get(self.number)
        sent = self.identity.public, self.mask_key.public, self.has_update
        if own is None or (own.identity, own.mask_key, own.has_update) != sent:
            raise ProtocolError(f"The list of participants lacks number {self.number} with the keys that it has sent.")
        if len(adverts) < max(minimum, MIN_CLIENTS):
            raise SecureAggregationError(
                f"Only {len(adverts)} clients are left in round {self.terms.round}; a secure sum needs "
                f"{max(minimum, MIN_CLIENTS)}."
            )
        for advert in adverts.values():
            whose = f"participant {advert.number} ({fingerprint(advert.identity)})"
            if not 1 <= advert.number <= self.terms.num_clients:
                raise ProtocolError(f"There is no {whose} in a round of {self.terms.num_clients}.")
            _check_terms(self.terms, advert.terms, whose)
            if self.trusted is not None and advert.identity not in self.trusted:
                raise ProtocolError(
                    f"{whose} is not among the trusted identities. Do you know it? lightning-fl keys trust"
                )
            verify(advert.identity, advert.signature, advert.signed, whose)
        keys = [key for advert in adverts.values() for key in (advert.identity, advert.mask_key)]
        if self.channel_key is not None:
            keys += [advert.channel_key for advert in adverts.values()]
        if len(set(keys)) != len(keys):
            raise ProtocolError("Two participants have the same key.")

    def pair_key(self, key: AgreementKey, other: bytes, label: str, first: int, second: int, context: bytes) -> bytes:
        """The key that two participants derive for one purpose.

        Args:
            key: This one's agreement key.
            other: The other's public one.
            label: The purpose.
            first: Number of the pair's first: the smaller one for masks, the sender for a channel.
            second: Number of the other.
            context: From :func:`context_of`.
        """
        return pair_key(key, other, label, first, second, self.terms.session, context)


def pair_key(
    key: AgreementKey, other: bytes, label: str, first: int, second: int, session: bytes, context: bytes
) -> bytes:
    """HKDF over the X25519 secret: salt is the session, the info names purpose, pair, round, attempt and hashes."""
    numbers = first.to_bytes(4, "little") + second.to_bytes(4, "little")
    return derive(key.agree(other), session, b"lightning_fl secagg " + label.encode() + numbers + context)


def mask_of(key: AgreementKey, number: int, other: Advert, session: bytes, context: bytes) -> tuple[bytes, int]:
    """The key of the mask between two participants, and its sign: the smaller number adds, the other takes off."""
    first, second = sorted((number, other.number))
    return pair_key(key, other.mask_key, "mask", first, second, session, context), 1 if number == first else -1


def context_of(terms: Terms, roster: Roster) -> bytes:
    """A hash of the terms (session, round, attempt, model, settings) and of who takes part with which keys."""
    return digest(b"context", terms.encode(), roster.digest)


def fingerprint(identity: bytes) -> str:
    """A name of an identity for people to compare: 128 bits of its hash."""
    return digest(b"identity", identity).hex()[:32]


def _check_terms(own: Terms, other: Terms, whose: str) -> None:
    if own == other:
        return
    reasons = {
        "model": "starts from another global model. All clients must have the same one, bit for bit",
        "settings": "has other settings of the secure sum, or other tensors. Start all with the same",
    }
    for name in ("model", "settings", "session", "round", "attempt", "num_clients", "threshold"):
        if getattr(own, name) != getattr(other, name):
            reason = reasons.get(name, f"sent keys for another {name}: they are old, or meant for another sum")
            raise ProtocolError(f"{whose} {reason}.")
