"""The double-masking protocol among simulated clients of one process, over the real messages."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_fl.privacy.secagg.bonawitz_client import BonawitzClient
from lightning_fl.privacy.secagg.bonawitz_server import BonawitzServer
from lightning_fl.privacy.secagg.dropouts import STAGES
from lightning_fl.privacy.secagg.journal import Journal
from lightning_fl.privacy.secagg.messages import Terms
from lightning_fl.privacy.secagg.participant import Trusted
from lightning_fl.privacy.secagg.primitives import SigningKey, digest


class Simulation:
    """Coordinator and clients in one process; keys and shares go round at once, vectors as the clients finish.

    Args:
        terms: What all agree to.
        identities: Who takes part, by number.
        num_words: Length of the vectors.
        dtype: Type of the words.
        dropouts: For those who vanish, the stage at which they do.
        trusted: Whom the clients trust; None: whoever comes.
        journal: Remembers which vectors have left, for all clients together.
    """

    def __init__(
        self,
        terms: Terms,
        identities: Mapping[int, SigningKey],
        num_words: int,
        dtype: torch.dtype,
        dropouts: Mapping[int, str] | None = None,
        trusted: Trusted = None,
        journal: Journal | None = None,
    ) -> None:
        self._last = {number: STAGES.index(stage) for number, stage in (dropouts or {}).items()}
        self._journal = journal or Journal()
        self._clients = {
            number: BonawitzClient(number, identity, terms, trusted, self._journal)
            for number, identity in identities.items()
        }
        self.num_bytes = 0
        self.server = BonawitzServer(terms, num_words, dtype)
        roster = self.server.roster([self._count(self._clients[number].advertise()) for number in self._alive(0)])
        shares = [self._count(self._clients[number].share(self._count(roster))) for number in self._alive(1)]
        self._bundles = self.server.bundles(shares)
        self._sent: list[int] = []

    def is_waiting_for(self, number: int) -> bool:
        """Whether the client has still to send its vector."""
        return number in self._alive(2) and number not in self._sent

    def send(self, number: int, words: Tensor, vector: bytes) -> None:
        """Lets a client send its vector, which is masked in place.

        Args:
            number: The client.
            words: Its vector, on the CPU.
            vector: What the vector is known by in the journal.
        """
        bundle = self._count(self._bundles[number])
        known_by = digest(vector, number.to_bytes(4, "little"))
        self.server.receive(self._count(self._clients[number].send(bundle, words, known_by)))
        self._sent.append(number)

    def finish(self) -> tuple[Tensor, list[int]]:
        """The sum of the vectors that were sent, and who sent them.

        Raises:
            SecureAggregationError: If too few clients are left.
        """
        survivors = self.server.survivors()
        alive = [number for number in self._sent if number in self._alive(3)]
        agreed = [self._count(self._clients[number].agree(self._count(survivors))) for number in alive]
        signatures = self.server.signatures(agreed)
        alive = [number for number in alive if number in self._alive(4)]
        return self.server.finish(
            [self._count(self._clients[number].unmask(self._count(signatures))) for number in alive]
        )

    def _alive(self, stage: int) -> list[int]:
        return [number for number in self._clients if self._last.get(number, len(STAGES)) > stage]

    def _count(self, message: bytes) -> bytes:
        self.num_bytes += len(message)
        return message
