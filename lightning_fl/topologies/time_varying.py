"""Graphs that change from round to round."""

# No `from __future__ import annotations`: jsonargparse would resolve the strings in the modules of the subclasses.
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from lightning_fl.seeding import round_rng
from lightning_fl.topologies.topology import Edge, Topology


@dataclass(frozen=True)
class Random(Topology):
    """A new random graph in every round, drawn from (seed, round): each pair is linked with probability ``p``.

    The graph of a single round may be disconnected; over the rounds each node's information reaches all others.

    Args:
        p: The probability, in (0, 1].
        seed: Seed of the draws. Default 0.

    Raises:
        ValueError: If ``p`` is out of range.
    """

    p: float
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.p <= 1:
            raise ValueError(f"Random got p={self.p}; expected a probability in (0, 1].")

    def edges(self, num_nodes: int, round: int = 0) -> Iterable[Edge]:
        drawn = round_rng(self.seed, round, "topology").random(num_nodes * (num_nodes - 1) // 2) < self.p
        return (pair for pair, is_linked in zip(combinations(range(num_nodes), 2), drawn, strict=True) if is_linked)

    def check(self, num_nodes: int) -> None:
        """See :meth:`Topology.check`; every pair is linked in some round."""


@dataclass(frozen=True)
class Exponential(Topology):
    r"""Each node receives from those 1, 2, 4, ... positions before it, so that information spreads in few rounds.

    Args:
        one_peer: Whether each round uses only one of these distances, in turn: one message per node and round, and the
            exact mean after :math:`\log_2 n` rounds if the number of clients is a power of 2. Default False: all
            distances in every round.

    Raises:
        ValueError: In the first round, if the clients' weights differ.
    """

    one_peer: bool = False

    @property
    def is_directed(self) -> bool:
        return True

    def period(self, num_nodes: int) -> int:
        return max(1, len(_distances(num_nodes))) if self.one_peer else 1

    def edges(self, num_nodes: int, round: int = 0) -> Iterable[Edge]:
        distances = _distances(num_nodes)
        if self.one_peer and distances:
            distances = [distances[round % len(distances)]]
        return ((node, (node + distance) % num_nodes) for node in range(num_nodes) for distance in distances)

    def matrix(self, num_nodes: int, round: int = 0, weights: Tensor | None = None) -> Tensor:
        if weights is not None and not torch.allclose(weights, weights.new_tensor(1 / num_nodes)):
            low, high = weights.min(), weights.max()
            raise ValueError(
                f"{self!r} mixes all clients alike, but their weights are {low:.3g} to {high:.3g}, so that they would "
                "be ignored. Use weighting='uniform', or a graph whose edges go both ways."
            )
        # Every node has the same number of senders and receivers, so equal shares give a doubly stochastic matrix.
        return self.push_matrix(num_nodes, round)


def _distances(num_nodes: int) -> list[int]:
    return [1 << power for power in range((num_nodes - 1).bit_length())]
