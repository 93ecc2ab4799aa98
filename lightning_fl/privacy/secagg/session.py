"""The state shared by all secure sums of a run: identities, trusted peers, a session id, the journal."""

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

    It is a resource with a single owner, like a socket, not a value: the attempt counters, the simulated identities
    and the journal must advance even when a sum fails, and a call that raises can return nothing.

    Args:
        session_id: 32 bytes to which every rank has contributed.
        is_simulated: Whether the clients are simulated; each client's identity is then made on first use.
        identity: The silo's identity, on the process that communicates for it.
        trusted: The identities that may take part; None in simulations.
        journal: Records with which clients each vector was summed.
        ranges: The value ranges of an update, the same on all ranks.
    """

    def __init__(
        self,
        session_id: bytes,
        is_simulated: bool,
        identity: SigningKey | None,
        trusted: Trusted,
        journal: Journal,
        ranges: Ranges,
    ) -> None:
        self.id = session_id
        self.is_simulated = is_simulated
        self.trusted = trusted
        self.journal = journal
        self.ranges = ranges
        self._identity = identity
        self._simulated: dict[ClientId, SigningKey] = {}
        self._attempts: Counter[object] = Counter()

    def identity(self, client: ClientId) -> SigningKey:
        """Returns the signing key of a client of this rank.

        A simulated client keeps its key for the whole session, so that the journal recognises a repeated sum.
        """
        if self._identity is not None:
            return self._identity
        if client not in self._simulated:
            self._simulated[client] = SigningKey()
        return self._simulated[client]

    def next_attempt(self, about: object) -> int:
        """Counts the attempts at a sum, from 0; the number invalidates the messages of earlier attempts."""
        self._attempts[about] += 1
        return self._attempts[about] - 1

    def is_first(self, topic: str) -> bool:
        """Returns whether this is the first call for a topic, so that a warning is given once."""
        return self.next_attempt(("warning", topic)) == 0

    def vector_id(self, model: bytes, round: int) -> bytes:
        """Returns the journal's id of the vector trained from a model.

        In a simulation the round is part of it, because many rounds may start from the same model there.
        """
        return digest(model, round.to_bytes(8, "little")) if self.is_simulated else model


def open_session(group: Group, silos: bool, keys: str | None, ranges: Ranges) -> Session:
    """Opens a session among all ranks; every rank must call it.

    Args:
        group: The ranks of the federation.
        silos: Whether each rank is a silo, which needs its own identity.
        keys: Folder of the silo's keys; ``{rank}`` stands for its rank. None: ``$LIGHTNING_FL_KEYS``, or
            ``keys/silo{rank}``.
        ranges: The value ranges of an update.

    Raises:
        ValueError: On every rank, if a silo lacks keys or does not trust another; the message has the commands to run.
    """
    # A problem is gathered rather than raised immediately, so that all ranks stop together.
    nonce, problem = os.urandom(32), ""
    identity, trusted = None, None
    place = (keys or os.environ.get(KEYS_VARIABLE) or DEFAULT_KEYS).replace("{rank}", str(group.rank))
    folder = KeyFolder(place)
    journal = Journal()
    if silos and group.talks:
        try:
            identity = folder.identity()
            trusted = frozenset([identity.public, *(other.key for other in folder.trusted())])
            journal = Journal(folder.journal_path)
        except (ValueError, OSError) as error:
            problem = str(error)
    public = "" if identity is None else identity.public.hex()
    hello = Message({"nonce": nonce.hex(), "identity": public, "problem": problem, "folder": place})
    gathered = [message.fields for message in group.all_gather(hello, "secure session")]
    if any(fields["problem"] for fields in gathered):
        raise ValueError(_how_to_make_keys(gathered, group))
    if silos:
        untrusted = Message({"doubts": _untrusted_peers(gathered, group, trusted, place)})
        problems = [message.fields["doubts"] for message in group.all_gather(untrusted, "trust")]
        if any(problems):
            raise ValueError("\n".join(filter(None, problems)))
    # Every rank contributes a nonce, so none can bring back the session, and with it the messages, of an earlier run.
    session_id = digest(*(bytes.fromhex(fields["nonce"]) for fields in gathered))
    return Session(session_id, not silos, identity, trusted, journal, ranges)


def _untrusted_peers(gathered: list[dict[str, str]], group: Group, trusted: Trusted, place: str) -> str:
    """Describes which peers this rank does not trust, and what to do; empty if it trusts all."""
    own = group.who(group.rank).capitalize()
    identities = [bytes.fromhex(fields["identity"]) for fields in gathered]
    strangers = [other for other, identity in enumerate(identities) if identity not in (trusted or ())]
    if strangers:
        who = ", ".join(f"{group.who(other)} ({fingerprint(identities[other])})" for other in strangers)
        return (
            f"{own} does not trust {who}. If its people confirm that fingerprint, get their identity.pub and "
            f"run: lightning-fl keys trust {place} <identity.pub>"
        )
    if len(set(identities)) != len(identities):
        return f"{own} sees two ranks with the same identity; each silo needs its own."
    return ""


def _how_to_make_keys(gathered: list[dict[str, str]], group: Group) -> str:
    problems = [
        f"  {group.who(rank)}: {fields['problem']}" for rank, fields in enumerate(gathered) if fields["problem"]
    ]
    folders = [fields["folder"] for fields in gathered]
    create = [f"  lightning-fl keys create {folder}" for folder in folders]
    trust = [
        " ".join(
            [f"  lightning-fl keys trust {mine}", *(f"{other}/identity.pub" for other in folders if other != mine)]
        )
        for mine in folders
    ]
    return "\n".join(
        [
            "Secure aggregation between silos needs an identity for each, known to all others:",
            *problems,
            "Each silo makes its own, and trusts the public keys that the others send it:",
            *create,
            *trust,
            f"Other places: SecureAggregation(keys='<folder>') or the variable {KEYS_VARIABLE}.",
        ]
    )
