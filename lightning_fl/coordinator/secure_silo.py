"""A silo's side of secure sums over a coordinator; it trusts only data that other silos have signed."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_fl.coordinator.secure_sum import ROSTER, VECTOR, Advert, in_order, signed_names, summed_names
from lightning_fl.privacy.secagg import ProtocolError, SecureAggregation
from lightning_fl.privacy.secagg.aggregator import model_digest, tensors_digest
from lightning_fl.privacy.secagg.bonawitz_client import BonawitzClient
from lightning_fl.privacy.secagg.journal import Journal
from lightning_fl.privacy.secagg.keys import KeyFolder
from lightning_fl.privacy.secagg.messages import Roster, SessionParams
from lightning_fl.privacy.secagg.packing import Packing, with_report
from lightning_fl.privacy.secagg.participant import MIN_CLIENTS, two_thirds
from lightning_fl.privacy.secagg.primitives import digest, verify
from lightning_fl.privacy.secagg.quantize import DTYPES
from lightning_fl.privacy.secagg.session import KEYS_VARIABLE
from lightning_fl.types import Tree, Update

Post = Callable[[str, Mapping[str, Tensor], Mapping[str, Any]], bool]
"""Sends tensors and fields about a topic; returns False if it is too late."""
Get = Callable[[str], Mapping[str, Any] | None]
"""The outcome of a topic; None if the round is over."""


class SumDropped(RuntimeError):
    """The coordinator has dropped a secure sum. No update was revealed."""


class SecureSums:
    """A silo's keys and settings for the secure sums of a run.

    Args:
        aggregator: The settings of secure aggregation.
        weighting: How the federation weighs its silos.
        keys: The folder with the silo's identity, unless the aggregator or ``$LIGHTNING_FL_KEYS`` names another.
        start: SHA-256 of the federation's initial model.

    Raises:
        ValueError: If the silo has no identity, or trusts too few others; the message has the commands to run.
    """

    def __init__(self, aggregator: SecureAggregation, weighting: str, keys: Path, start: str) -> None:
        self.aggregator = aggregator
        self.ranges = aggregator.ranges_of(lambda: 1.0 if weighting == "uniform" else None)
        folder = KeyFolder(aggregator.keys or os.environ.get(KEYS_VARIABLE) or keys)
        self.identity = folder.identity()
        self.trusted = frozenset([self.identity.public, *(other.key for other in folder.trusted())])
        if len(self.trusted) < MIN_CLIENTS:
            raise ValueError(
                f"{folder.path} trusts {len(self.trusted) - 1} other silos; a secure sum needs at least "
                f"{MIN_CLIENTS - 1}. Get their identity.pub, compare the fingerprints by telephone, and run: "
                f"lightning-fl keys trust {folder.path} <identity.pub> ..."
            )
        self.journal = Journal(folder.journal_path)
        # Not random as between ranks: the keys of each sum are new, and everything derived or signed is bound to them.
        self.session = digest(b"coordinator", bytes.fromhex(start))

    # ---- a sum's parameters and vectors

    def model_id(self, template: Update) -> bytes:
        """The journal's identifier for updates trained from a model."""
        return model_digest(in_order(template))

    def check_model(self, template: Update) -> None:
        """Checks, before a silo trains, that it may send an update trained from a model.

        Raises:
            RetryRefused: If it has sent an update from this model before.
        """
        self.journal.check(self.model_id(template))

    def params_of_round(
        self, round: int, attempt: int, cohort: Sequence[str], template: Update, frozen: Tree
    ) -> SessionParams:
        """The parameters of the sum of a round's updates."""
        settings = digest(repr(self.aggregator).encode(), Packing(in_order(template), self.ranges).digest)
        model = digest(self.model_id(template), tensors_digest(dict(sorted(frozen.items()))))
        threshold = self.aggregator.min_clients_of(len(cohort))
        return SessionParams(self.session, model, settings, round, attempt, len(cohort), threshold)

    def params_of_messages(self, round: int, topic: str, members: Sequence[str]) -> SessionParams:
        """The parameters of a sum of scalars after a round."""
        settings, model = digest(repr(self.aggregator).encode()), digest(topic.encode())
        return SessionParams(self.session, model, settings, round, 0, len(members), two_thirds(len(members)))

    def vector_of(self, update: Update, template: Update, cohort: Sequence[str]) -> Tensor:
        """A silo's update as integers, without masks."""
        packing = Packing(in_order(template), self.ranges)
        vector = packing.zeros(torch.device("cpu"))
        packing.add(vector, in_order(update), len(cohort))
        return vector

    def empty_vector(self) -> Tensor:
        """The vector of a sum of scalars only."""
        return torch.empty(0, dtype=DTYPES[self.ranges.modulus_bits])

    # ---- a sum

    def advertise(self, params: SessionParams, number: int, names: Sequence[str]) -> tuple[BonawitzClient, Advert]:
        """Creates the keys of a sum.

        Args:
            params: The sum's parameters.
            number: This silo's number in it.
            names: The scalars that it adds.
        """
        client = BonawitzClient(number, self.identity, params, self.trusted, self.journal)
        keys = client.advertise()
        return client, Advert(keys, names, self.identity.sign(signed_names(keys, names)))

    def take_part(
        self,
        name: str,
        base: str,
        params: SessionParams,
        client: BonawitzClient,
        vector: Tensor,
        scalars: Mapping[str, float],
        vector_id: bytes,
        post: Post,
        get: Get,
    ) -> None:
        """Takes part in the steps of a sum, as long as the coordinator includes this silo.

        Args:
            name: This silo's name.
            base: The topic of the sum.
            params: The sum's parameters.
            client: This silo's keys, which it has advertised.
            vector: The silo's summand; masked in place.
            scalars: Further summands; those that enough silos list are summed.
            vector_id: Identifies the vector in the journal.
            post: Sends a message.
            get: Waits for the outcome of a step.

        Raises:
            SumDropped: If the sum was dropped.
            ProtocolError: If the coordinator sends something that an honest one would not. Nothing more is sent.
            RetryRefused: If the vector was sent before.
        """

        def outcome(step: str) -> Mapping[str, Any] | None:
            found = get(f"{base}.{step}")
            if found is not None and "dropped" in found:
                raise SumDropped(str(found["dropped"]))
            return None if found is None or name not in found["members"] else found

        def answer(step: str, message: bytes) -> bool:
            return post(f"{base}.{step}", {}, {"step": message.hex()})

        def steps() -> None:
            if (found := outcome(ROSTER)) is None:
                return
            roster = bytes.fromhex(found["roster"])
            shares = client.share(roster)
            names = _checked_names(Roster.decode(roster), found["names"], params)
            if not answer("share", shares) or (found := outcome("share")) is None:
                return
            whole = with_report(vector, names, scalars, 1)
            client.send(bytes.fromhex(found["bundles"][name]), whole, vector_id)  # masks it in place
            if not post(f"{base}.send", {VECTOR: whole}, {}) or (found := outcome("send")) is None:
                return
            agreed = client.agree(bytes.fromhex(found["survivors"]))
            if not answer("agree", agreed) or (found := outcome("agree")) is None:
                return
            answer("unmask", client.unmask(bytes.fromhex(found["signatures"])))

        try:
            steps()
            outcome("unmask")  # also for a silo that was too late: the others may need it if the sum is dropped
        except (KeyError, TypeError) as error:
            raise ProtocolError(f"The coordinator's answer lacks something: {error!r}") from error
        finally:
            client.end()


def _checked_names(roster: Roster, listed: Mapping[str, Any], params: SessionParams) -> list[str]:
    found = {}
    for number, keys in roster.advertisements.items():
        advert = Advert.read(listed[str(number)])
        what = signed_names(keys.encode(), advert.names)
        verify(keys.identity, advert.signature, what, f"participant {number} over the names of its metrics")
        found[number] = advert.names
    return summed_names(list(found.values()), params.threshold)
