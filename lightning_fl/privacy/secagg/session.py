"""What a rank keeps for the secure sums of a run: identities, whom it trusts, a common session, what has left."""

from __future__ import annotations

import os
from collections import Counter

from lightning_fl.communication import Group, Message
from lightning_fl.privacy.secagg.journal import Journal
from lightning_fl.privacy.secagg.keys import KeyFolder
from lightning_fl.privacy.secagg.packing import Ranges
from lightning_fl.privacy.secagg.participant import Trusted, fingerprint
from lightning_fl.privacy.secagg.primitives import Secret, SigningKey, digest
from lightning_fl.types import ClientId

DEFAULT_KEYS = "keys/silo{rank}"
KEYS_VARIABLE = "LIGHTNING_FL_KEYS"


class Session(Secret):
    """One rank's side of the session that all ranks share; returned by ``SecureAggregation.open``.

    It is a resource with a single owner, like a socket: each rank uses its own, in the order of the sums. Counters,
    simulated identities and the journal advance with every sum that is *attempted*, also when the attempt fails and
    has nothing to return; so they can't be passed from one call to the next.

    Args:
        session: 32 bytes to which every rank has contributed.
        identity: The silo's identity; None in simulations, where each client gets one for the occasion.
        trusted: The identities that may take part; None in simulations.
        journal: Remembers among whom vectors have left.
        ranges: How far the coordinates of an update may go, the same on all ranks.
    """

    def __init__(
        self, session: bytes, identity: SigningKey | None, trusted: Trusted, journal: Journal, ranges: Ranges
    ) -> None:
        self.session = session
        self.trusted = trusted
        self.journal = journal
        self.ranges = ranges
        self._identity = identity
        self._simulated: dict[ClientId, SigningKey] = {}
        self._attempts: Counter[object] = Counter()

    @property
    def is_simulated(self) -> bool:
        """Whether the clients are simulated."""
        return self._identity is None

    def identity(self, client: ClientId) -> SigningKey:
        """Who a client of this rank is."""
        if self._identity is not None:
            return self._identity
        if client not in self._simulated:
            self._simulated[client] = SigningKey()
        return self._simulated[client]

    def next_attempt(self, about: object) -> int:
        """How often a sum about the same has been tried before; each attempt has keys of its own."""
        self._attempts[about] += 1
        return self._attempts[about] - 1

    def is_first(self, topic: str) -> bool:
        """Whether this is the first question about a topic, so that a warning is given once."""
        return self.next_attempt(("warning", topic)) == 0

    def vector_id(self, model: bytes, round: int) -> bytes:
        """What the vector trained from a model is known by; simulations may train from one model in many rounds."""
        return digest(model, round.to_bytes(8, "little")) if self.is_simulated else model


def open_session(group: Group, silos: bool, keys: str | None, ranges: Ranges) -> Session:
    """Opens a session among all ranks; every rank calls it.

    Args:
        group: The ranks of the federation.
        silos: Whether each rank is a silo, which needs an identity of its own.
        keys: Folder of the silo's keys; ``{rank}`` stands for its rank. None: ``$LIGHTNING_FL_KEYS``, or
            ``keys/silo{rank}``.
        ranges: How far the coordinates of an update may go.

    Raises:
        ValueError: On every rank, if a silo lacks keys or does not trust another one; it tells the commands to run.
    """
    nonce, problem = os.urandom(32), ""
    identity, trusted = None, None
    place = (keys or os.environ.get(KEYS_VARIABLE) or DEFAULT_KEYS).replace("{rank}", str(group.rank))
    folder = KeyFolder(place)
    journal = Journal()
    if silos:
        try:
            identity = folder.identity()
            trusted = frozenset([identity.public, *(other.key for other in folder.trusted())])
            journal = Journal(folder.journal_path)
        except (ValueError, OSError) as error:
            problem = str(error)
    public = "" if identity is None else identity.public.hex()
    hello = Message({"nonce": nonce.hex(), "identity": public, "problem": problem, "folder": place})
    told = [message.fields for message in group.all_gather(hello, "secure session")]
    if any(fields["problem"] for fields in told):
        raise ValueError(_how_to_make_keys(told))
    if silos:
        doubts = Message({"doubts": _doubts(told, group.rank, trusted, place)})
        found = [message.fields["doubts"] for message in group.all_gather(doubts, "trust")]
        if any(found):
            raise ValueError("\n".join(filter(None, found)))
    session = digest(*(bytes.fromhex(fields["nonce"]) for fields in told))
    return Session(session, identity, trusted, journal, ranges)


def _doubts(told: list[dict[str, str]], rank: int, trusted: Trusted, place: str) -> str:
    """Whom this rank does not trust, and what to do."""
    identities = [bytes.fromhex(fields["identity"]) for fields in told]
    strangers = [other for other, identity in enumerate(identities) if identity not in (trusted or ())]
    if strangers:
        who = ", ".join(f"rank {other} ({fingerprint(identities[other])})" for other in strangers)
        return (
            f"Rank {rank} does not trust {who}. If its people confirm that fingerprint, take their identity.pub and "
            f"run: lightning-fl keys trust {place} <identity.pub>"
        )
    if len(set(identities)) != len(identities):
        return f"Rank {rank} sees two ranks with the same identity; each silo needs one of its own."
    return ""


def _how_to_make_keys(told: list[dict[str, str]]) -> str:
    problems = [f"  rank {rank}: {fields['problem']}" for rank, fields in enumerate(told) if fields["problem"]]
    folders = [fields["folder"] for fields in told]
    create = [f"  lightning-fl keys create {folder}" for folder in folders]
    trust = [
        " ".join([f"  lightning-fl keys trust {own}", *(f"{other}/identity.pub" for other in folders if other != own)])
        for own in folders
    ]
    return "\n".join(
        [
            "Secure aggregation between silos needs an identity for each, known to all others:",
            *problems,
            "Each silo makes one, and trusts the public ones that the others send it:",
            *create,
            *trust,
            f"Other places: SecureAggregation(keys='<folder>') or the variable {KEYS_VARIABLE}.",
        ]
    )
