"""Hierarchical, cyclic and swarm federations."""

# No `from __future__ import annotations`: jsonargparse would resolve the strings in the modules of the subclasses.
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from lightning_fl.seeding import round_rng
from lightning_fl.topologies.topology import Edge, Topology


@dataclass(frozen=True)
class Edges(Topology):
    r"""HierFAVG: clients average at an edge server each round, and all edges average at the cloud every few rounds.

    After a round each client has the weighted mean of its edge's clients; after every ``edge_rounds``-th round it has
    the mean of all. An edge without data keeps its model until then. With ``edge_rounds=1`` it is federated averaging.

    Args:
        groups: The clients of each edge, by their positions in the order of the clients' ids; or the number of edges,
            among which the clients are divided in contiguous blocks of that order.
        edge_rounds: Number of rounds between two means of all clients, the paper's :math:`\kappa_2`. Default 2.

    Raises:
        ValueError: If ``edge_rounds`` is below 1; when training starts, if a client is in no group or in several.

    Reference:
        Liu et al., "Client-Edge-Cloud Hierarchical Federated Learning", ICC 2020.
    """

    groups: int | Sequence[Sequence[int]]
    edge_rounds: int = 2

    def __post_init__(self) -> None:
        if self.edge_rounds < 1:
            raise ValueError(f"Edges got edge_rounds={self.edge_rounds}; expected at least 1.")
        if not isinstance(self.groups, int):
            object.__setattr__(self, "groups", tuple(map(tuple, self.groups)))

    def members(self, num_nodes: int) -> list[list[int]]:
        """The nodes of each edge.

        Raises:
            ValueError: If a node is in no group or in several.
        """
        if isinstance(self.groups, int):
            if not 1 <= self.groups <= num_nodes:
                raise ValueError(f"{self!r} cannot divide {num_nodes} clients; expected 1 to {num_nodes} groups.")
            bounds = [num_nodes * edge // self.groups for edge in range(self.groups + 1)]
            return [list(range(bounds[edge], bounds[edge + 1])) for edge in range(self.groups)]
        found = sorted(node for group in self.groups for node in group)
        if found != list(range(num_nodes)):
            raise ValueError(
                f"{self!r} must name each of the {num_nodes} clients once, by their positions 0 to {num_nodes - 1} in "
                f"the order of their ids; it names {found}."
            )
        return [list(group) for group in self.groups]

    def edges(self, num_nodes: int, round: int = 0) -> Iterable[Edge]:
        groups = [list(range(num_nodes))] if self._reaches_cloud(round) else self.members(num_nodes)
        return (pair for group in groups for pair in combinations(group, 2))

    def matrix(self, num_nodes: int, round: int = 0, weights: Tensor | None = None) -> Tensor:
        own = torch.full((num_nodes,), 1 / num_nodes, dtype=torch.float64) if weights is None else weights.double()
        if self._reaches_cloud(round):
            return own.expand(num_nodes, num_nodes).clone()
        found = torch.zeros(num_nodes, num_nodes, dtype=torch.float64)
        for group in self.members(num_nodes):
            total = own[group].sum()
            for node in group:
                found[node, group] = own[group] / total if total > 0 else 0.0
                if not total > 0:
                    found[node, node] = 1.0
        return found

    def check(self, num_nodes: int) -> None:
        self.members(num_nodes)

    def rho(self, num_nodes: int) -> float:
        return 0.0  # all agree after the mean of all

    def _reaches_cloud(self, round: int) -> bool:
        return (round + 1) % self.edge_rounds == 0


@dataclass(frozen=True)
class Cyclic(Topology):
    """Cyclic weight transfer: one model is passed from client to client; each round is a visit to one client.

    ``n`` rounds visit all ``n`` clients once. Nothing is averaged: the round's client trains the global model, and the
    result is the next global model. If the clients' data differ, the model fits those of the last clients best.

    Args:
        reverse: Whether the model goes from the last client to the first. Default False.
    """

    reverse: bool = False

    def edges(self, num_nodes: int, round: int = 0) -> Iterable[Edge]:
        place = -(round + 1) % num_nodes if self.reverse else round % num_nodes
        return [(place, (place - 1 if self.reverse else place + 1) % num_nodes)]


@dataclass(frozen=True)
class Swarm(Topology):
    """Swarm learning: one global model; in each round a randomly elected client computes the average.

    All clients send their updates to the elected one and receive the mean, the same as with a server. No party is the
    server permanently: on average each sees the others' updates in one of ``n`` rounds, and no machine outside the
    silos is needed. The election is drawn from (seed, round), so that all know the result without communication.

    Args:
        seed: Seed of the elections. Default 0.

    Reference:
        Warnat-Herresthal et al., "Swarm Learning for decentralized and confidential clinical machine learning", Nature
        2021.
    """

    seed: int = 0

    def elected(self, num_nodes: int, round: int) -> int:
        """The node that averages in a round."""
        return int(round_rng(self.seed, round, "swarm").integers(num_nodes))

    def edges(self, num_nodes: int, round: int = 0) -> Iterable[Edge]:
        place = self.elected(num_nodes, round)
        return [(node, place) for node in range(num_nodes) if node != place]
