"""The double-masking protocol among simulated clients of one process, over real messages."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_fl.privacy.secagg.bonawitz_client import BonawitzClient
from lightning_fl.privacy.secagg.bonawitz_server import BonawitzServer
from lightning_fl.privacy.secagg.dropouts import STAGES
from lightning_fl.privacy.secagg.journal import Journal
from lightning_fl.privacy.secagg.messages import SessionParams
from lightning_fl.privacy.secagg.participant import Trusted
from lightning_fl.privacy.secagg.primitives import SigningKey, digest


class Simulation:
    """Coordinator and clients in one process. Keys and shares are exchanged at once, vectors as the clients finish.

    Args:
        params: The parameters that all agree to.
        identities: The clients' signing keys, by number.
        vector_size: Length of the vectors.
        dtype: Type of their elements.
        dropouts: For clients that drop out, the stage at which they do.
        trusted: The identities that the clients accept; None: any.
        journal: Records which vectors were sent, for all clients together.
    """

    def __init__(
        self,
        params: SessionParams,
        identities: Mapping[int, SigningKey],
        vector_size: int,
        dtype: torch.dtype,
        dropouts: Mapping[int, str] | None = None,
        trusted: Trusted = None,
        journal: Journal | None = None,
    ) -> None:
        self._last = {number: STAGES.index(stage) for number, stage in (dropouts or {}).items()}
        self._journal = journal or Journal()
        self._clients = {
            number: BonawitzClient(number, identity, params, trusted, self._journal)
            for number, identity in identities.items()
        }
        self.num_bytes = 0
        self.server = BonawitzServer(params, vector_size, dtype)
        roster = self.server.roster([self._count(self._clients[number].advertise()) for number in self._alive(0)])
        shares = [self._count(self._clients[number].share(self._count(roster))) for number in self._alive(1)]
        self._bundles = self.server.bundles(shares)
        self._sent: list[int] = []

    def is_waiting_for(self, number: int) -> bool:
        """Returns whether the client has yet to send its vector."""
        return number in self._alive(2) and number not in self._sent

    def send(self, number: int, vector: Tensor, vector_id: bytes) -> None:
        """Sends a client's vector, which is masked in place.

        Args:
            number: The client.
            vector: Its vector, on the CPU.
            vector_id: Identifies the global model and round in the journal.
        """
        bundle = self._count(self._bundles[number])
        # All clients share one journal and train from one model, so the client's number must be part of the id.
        client_vector_id = digest(vector_id, number.to_bytes(4, "little"))
        self.server.receive(self._count(self._clients[number].send(bundle, vector, client_vector_id)))
        self._sent.append(number)

    def finish(self) -> tuple[Tensor, list[int]]:
        """Returns the sum of the vectors that were sent, and the numbers of their senders.

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
