"""What both protocols share: participants advertise keys, check those of the others and derive pairwise keys."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from lightning_fl.privacy.secagg.errors import ProtocolError, SecureAggregationError
from lightning_fl.privacy.secagg.messages import KeyAdvertisement, Roster, SessionParams
from lightning_fl.privacy.secagg.primitives import KEY_BYTES, AgreementKey, Secret, SigningKey, derive, digest, verify

MIN_CLIENTS = 3
"""With two, each learns the other's update by subtracting its own from the sum."""

Trusted = Collection[bytes] | None
"""The identities that may take part; None in simulations, where identities are made on demand."""


def two_thirds(num_clients: int) -> int:
    """Returns the threshold floor(2n/3) + 1.

    Any two sets of this size share more than n/3 clients. A coordinator that names different survivors to different
    clients therefore can't collect enough shares for two sums, unless more than n/3 clients conspire with it.
    """
    return 2 * num_clients // 3 + 1


@dataclass(frozen=True, repr=False)
class Participant(Secret):
    """One client's identity and keys for one secure sum.

    Args:
        number: Its number in the round, from 1.
        identity: Its signing key.
        params: The parameters it agrees to.
        trusted: The identities it accepts.
        mask_key: Agrees on the pairwise masks; made for this sum only.
        channel_key: Agrees on the keys that seal shares; None where none are sent.
        has_update: Whether it adds more than zeros to the sum.
    """

    number: int
    identity: SigningKey
    params: SessionParams
    trusted: Trusted
    mask_key: AgreementKey
    channel_key: AgreementKey | None = None
    has_update: bool = True

    def advertisement(self) -> KeyAdvertisement:
        """Returns its public keys, signed by its identity."""
        channel = bytes(KEY_BYTES) if self.channel_key is None else self.channel_key.public
        advertisement = KeyAdvertisement(
            self.number, self.identity.public, self.mask_key.public, channel, self.params, self.has_update
        )
        return replace(advertisement, signature=self.identity.sign(advertisement.signed))

    def check(self, roster: Roster, minimum: int) -> None:
        """Checks that the other participants are trusted and have agreed to the same parameters.

        Args:
            roster: The list of participants as received.
            minimum: The fewest participants that are accepted.

        Raises:
            ProtocolError: If a participant is not trusted, its signature or parameters are wrong, two share a key, or
                this participant is missing or altered.
            SecureAggregationError: If there are too few.
        """
        advertisements = roster.advertisements
        local = advertisements.get(self.number)
        sent = self.identity.public, self.mask_key.public, self.has_update
        # With other keys in its place the others would derive masks that do not cancel with its own, or that somebody
        # else knows.
        if local is None or (local.identity, local.mask_key, local.has_update) != sent:
            raise ProtocolError(f"The list of participants lacks number {self.number} with the keys that it has sent.")
        if len(advertisements) < max(minimum, MIN_CLIENTS):
            raise SecureAggregationError(
                f"Only {len(advertisements)} clients are left in round {self.params.round}; a secure sum needs "
                f"{max(minimum, MIN_CLIENTS)}."
            )
        for advertisement in advertisements.values():
            whose = f"participant {advertisement.number} ({fingerprint(advertisement.identity)})"
            if not 1 <= advertisement.number <= self.params.num_clients:
                raise ProtocolError(f"There is no {whose} in a round of {self.params.num_clients}.")
            _check_params(self.params, advertisement.params, whose)
            if self.trusted is not None and advertisement.identity not in self.trusted:
                raise ProtocolError(
                    f"{whose} is not among the trusted identities. Do you know it? lightning-fl keys trust"
                )
            verify(advertisement.identity, advertisement.signature, advertisement.signed, whose)
        keys = [
            key for advertisement in advertisements.values() for key in (advertisement.identity, advertisement.mask_key)
        ]
        if self.channel_key is not None:
            keys += [advertisement.channel_key for advertisement in advertisements.values()]
        # One party under two numbers would count twice towards the fewest participants.
        if len(set(keys)) != len(keys):
            raise ProtocolError("Two participants have the same key.")


def pair_key(
    key: AgreementKey, other: bytes, label: str, first: int, second: int, session: bytes, context: bytes
) -> bytes:
    """Derives a key by HKDF from the X25519 secret; the session is the salt, purpose, pair and context are the info."""
    numbers = first.to_bytes(4, "little") + second.to_bytes(4, "little")
    return derive(key.agree(other), session, b"lightning_fl secagg " + label.encode() + numbers + context)


def mask_of(
    key: AgreementKey, number: int, other: KeyAdvertisement, session: bytes, context: bytes
) -> tuple[bytes, int]:
    """Returns the key of the mask of two participants, and its sign: the smaller number adds, the other subtracts."""
    first, second = sorted((number, other.number))
    return pair_key(key, other.mask_key, "mask", first, second, session, context), 1 if number == first else -1


def context_of(params: SessionParams, roster: Roster) -> bytes:
    """Hashes the parameters (session, round, attempt, model, settings) and the roster.

    It is bound into every derived key and signature, so messages of another round or attempt are useless in this one.
    """
    return digest(b"context", params.encode(), roster.digest)


def fingerprint(identity: bytes) -> str:
    """Returns 128 bits of an identity's hash, for people to compare."""
    return digest(b"identity", identity).hex()[:32]


def _check_params(local: SessionParams, other: SessionParams, whose: str) -> None:
    if local == other:
        return
    reasons = {
        "model": "starts from another global model. All clients must have the same one, bit for bit",
        "settings": "has other settings of the secure sum, or other tensors. Start all with the same",
    }
    for name in ("model", "settings", "session", "round", "attempt", "num_clients", "threshold"):
        if getattr(local, name) != getattr(other, name):
            reason = reasons.get(name, f"sent keys for another {name}: they are old, or meant for another sum")
            raise ProtocolError(f"{whose} {reason}.")
