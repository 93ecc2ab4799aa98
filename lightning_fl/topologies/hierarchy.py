"""Federations with servers between the clients and the centre, or with one model and a server that is not fixed."""

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
    r"""HierFAVG: clients share the model of an edge server, and the edges that of the cloud every few rounds.

    After a round each client has the weighted mean of its edge's clients, and after every ``edge_rounds``-th that of
    all; an edge without data keeps its model until then. With ``edge_rounds=1`` it is federated averaging.

    Args:
        groups: The clients of each edge, by their places in the order of the clients' ids; or the number of edges, to
            which the clients belong in stretches of that order.
        edge_rounds: Rounds from one mean of all to the next, the paper's :math:`\kappa_2`. Default 2.

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
                f"{self!r} must name each of the {num_nodes} clients once, by their places 0 to {num_nodes - 1} in the "
                f"order of their ids; it names {found}."
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
        return 0.0  # after the mean of all, all agree

    def _reaches_cloud(self, round: int) -> bool:
        return (round + 1) % self.edge_rounds == 0


@dataclass(frozen=True)
class Cyclic(Topology):
    """One model goes from client to client; a round is the visit of one, and ``n`` rounds go round all ``n`` once.

    No client waits for another, and there is nothing to average: the round's client trains the global model, and the
    result is the next one (cyclic weight transfer). With different data the last clients count most.

    Args:
        reverse: Whether the model goes from the last client to the first. Default False.
    """

    reverse: bool = False

    def edges(self, num_nodes: int, round: int = 0) -> Iterable[Edge]:
        place = -(round + 1) % num_nodes if self.reverse else round % num_nodes
        return [(place, (place - 1 if self.reverse else place + 1) % num_nodes)]


@dataclass(frozen=True)
class Swarm(Topology):
    """Swarm learning: there is one model, and in each round another client is elected to average.

    All send their updates to the elected one and get the mean back, which is that of a server. No party is the server
    for good; one of ``n`` sees the others' updates in one of ``n`` rounds, and nobody needs a machine that is in no
    silo. The draw is from (seed, round), so that all know who is elected without a vote.

    Args:
        seed: Seed of the draws. Default 0.

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
