"""Participants of secure sums for tests, without networks or Trainers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_fl.privacy.secagg.bonawitz_client import BonawitzClient
from lightning_fl.privacy.secagg.bonawitz_server import BonawitzServer
from lightning_fl.privacy.secagg.journal import Journal
from lightning_fl.privacy.secagg.messages import SessionParams
from lightning_fl.privacy.secagg.pairwise import PairwiseClient
from lightning_fl.privacy.secagg.participant import two_thirds
from lightning_fl.privacy.secagg.primitives import SigningKey
from lightning_fl.privacy.secagg.simulate import Simulation

VECTOR_ID = b"the vector of this round"


def session_params(num_clients: int, threshold: int | None = None, **changes: object) -> SessionParams:
    settled = two_thirds(num_clients) if threshold is None else threshold
    plain = SessionParams(b"s" * 32, b"m" * 32, b"c" * 32, 4, 0, num_clients, settled)
    return SessionParams(**{**vars(plain), **changes})  # type: ignore[arg-type]


def identities(num_clients: int) -> dict[int, SigningKey]:
    return {number: SigningKey() for number in range(1, num_clients + 1)}


def vectors(num_clients: int, vector_size: int, dtype: torch.dtype = torch.int32) -> dict[int, Tensor]:
    generator = torch.Generator().manual_seed(num_clients)
    limit = torch.iinfo(dtype).max
    return {
        number: torch.randint(-limit - 1, limit, (vector_size,), generator=generator, dtype=dtype)
        for number in range(1, num_clients + 1)
    }


def pairwise_clients(num_clients: int, **changes: object) -> dict[int, PairwiseClient]:
    keys = identities(num_clients)
    trusted = [key.public for key in keys.values()]
    agreed = session_params(num_clients, 3, **changes)
    return {number: PairwiseClient(number, key, agreed, trusted, Journal()) for number, key in keys.items()}


def pairwise_views(inputs: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """The masked vectors that the clients send."""
    clients = pairwise_clients(len(inputs))
    advertisements = [client.advertise() for client in clients.values()]
    masked = {number: vector.clone() for number, vector in inputs.items()}
    for number, client in clients.items():
        client.mask(masked[number], advertisements, VECTOR_ID)
    return masked


def simulate(inputs: Mapping[int, Tensor], dropouts: Mapping[int, str]) -> tuple[Tensor, list[int]]:
    """The double-masking protocol with clients that vanish; raises where it ends without a sum."""
    vector = next(iter(inputs.values()))
    simulation = Simulation(
        session_params(len(inputs)), identities(len(inputs)), vector.numel(), vector.dtype, dropouts, journal=Journal()
    )
    for number, vector in inputs.items():
        if simulation.is_waiting_for(number):
            simulation.send(number, vector.clone(), VECTOR_ID)
    return simulation.finish()


@dataclass
class Federation:
    """Clients of the double-masking protocol and what an honest coordinator would tell them, step by step.

    Args:
        num_clients: Number of clients.
        vector_size: Length of their vectors.
    """

    num_clients: int = 4
    vector_size: int = 8
    agreed: SessionParams = field(init=False)

    def __post_init__(self) -> None:
        self.agreed = session_params(self.num_clients)
        self.keys = identities(self.num_clients)
        trusted = [key.public for key in self.keys.values()]
        self.journals = {number: Journal() for number in self.keys}
        self.clients = {
            number: BonawitzClient(number, key, self.agreed, trusted, self.journals[number])
            for number, key in self.keys.items()
        }
        self.server = BonawitzServer(self.agreed, self.vector_size, torch.int32)
        self.inputs = vectors(self.num_clients, self.vector_size)

    def advertise(self) -> dict[int, bytes]:
        return {number: client.advertise() for number, client in self.clients.items()}

    def share(self) -> dict[int, bytes]:
        """All shares, the adverts having gone round honestly."""
        self.roster = self.server.roster(list(self.advertise().values()))
        return {number: client.share(self.roster) for number, client in self.clients.items()}

    def bundles(self) -> dict[int, bytes]:
        return self.server.bundles(list(self.share().values()))

    def send(self, who: Sequence[int] | None = None) -> dict[int, bytes]:
        """The masked vectors of ``who``, or of all."""
        bundles = self.bundles()
        sent = {
            number: self.clients[number].send(bundles[number], self.inputs[number].clone(), VECTOR_ID)
            for number in (who or self.clients)
        }
        for vector in sent.values():
            self.server.receive(vector)
        return sent

    def agree(self, who: Sequence[int] | None = None) -> dict[int, bytes]:
        sent = self.send(who)
        self.survivors = self.server.survivors()
        return {number: self.clients[number].agree(self.survivors) for number in sent}

    def signatures(self, who: Sequence[int] | None = None) -> bytes:
        return self.server.signatures(list(self.agree(who).values()))
