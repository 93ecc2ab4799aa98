"""Graphs that stay as they are."""

# No `from __future__ import annotations`: jsonargparse would resolve the strings in the modules of the subclasses.
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from lightning_fl.topologies.topology import Edge, Topology


@dataclass(frozen=True)
class Complete(Topology):
    """Every node mixes with all others: each has the weighted mean after a round, as with a server."""

    def edges(self, num_nodes: int, round: int = 0) -> Iterable[Edge]:
        return combinations(range(num_nodes), 2)

    def matrix(self, num_nodes: int, round: int = 0, weights: Tensor | None = None) -> Tensor:
        own = torch.full((num_nodes,), 1 / num_nodes, dtype=torch.float64) if weights is None else weights.double()
        return own.expand(num_nodes, num_nodes).clone()


@dataclass(frozen=True)
class Ring(Topology):
    """Each node mixes with the one before and the one after it."""

    def edges(self, num_nodes: int, round: int = 0) -> Iterable[Edge]:
        return ((node, (node + 1) % num_nodes) for node in range(num_nodes))


@dataclass(frozen=True)
class Path(Topology):
    """A ring that is open between the last and the first node."""

    def edges(self, num_nodes: int, round: int = 0) -> Iterable[Edge]:
        return ((node, node + 1) for node in range(num_nodes - 1))


@dataclass(frozen=True)
class Star(Topology):
    """All nodes mix with the first one."""

    def edges(self, num_nodes: int, round: int = 0) -> Iterable[Edge]:
        return ((0, node) for node in range(1, num_nodes))


@dataclass(frozen=True)
class Grid(Topology):
    """A table of nodes, row by row, each of which mixes with those above, below and beside it.

    Args:
        rows: Number of rows.
        columns: Number of columns.
    """

    rows: int
    columns: int

    wraps = False
    """Whether the last row is beside the first, and the last column beside the first."""

    def edges(self, num_nodes: int, round: int = 0) -> Iterable[Edge]:
        if self.rows * self.columns != num_nodes:
            raise ValueError(
                f"{self!r} has {self.rows * self.columns} nodes, but the federation {num_nodes} clients. Give it rows "
                "and columns whose product is the number of clients."
            )
        for row in range(self.rows):
            for column in range(self.columns):
                for below, right in ((row + 1, column), (row, column + 1)):
                    if self.wraps or (below < self.rows and right < self.columns):
                        other = below % self.rows * self.columns + right % self.columns
                        yield row * self.columns + column, other


@dataclass(frozen=True)
class Torus(Grid):
    """A grid without a border: its last row is beside the first, and its last column beside the first.

    Args:
        rows: Number of rows.
        columns: Number of columns.
    """

    wraps = True


@dataclass(frozen=True)
class Hypercube(Topology):
    """Nodes mix with those whose numbers differ from theirs in one binary digit; their number is a power of 2."""

    def edges(self, num_nodes: int, round: int = 0) -> Iterable[Edge]:
        if num_nodes & (num_nodes - 1):
            raise ValueError(f"Hypercube() needs a power of 2 as the number of clients, and found {num_nodes}.")
        bits = range(num_nodes.bit_length() - 1)
        return ((node, node ^ (1 << bit)) for node in range(num_nodes) for bit in bits)


@dataclass(frozen=True)
class Graph(Topology):
    """The edges that are given.

    Args:
        pairs: Pairs of nodes, by their places in the order of the clients' ids.
        directed: Whether an edge goes from the first to the second node only. Default False.
    """

    pairs: Sequence[tuple[int, int]]
    directed: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "pairs", tuple((int(source), int(target)) for source, target in self.pairs))

    @property
    def is_directed(self) -> bool:
        return self.directed

    def edges(self, num_nodes: int, round: int = 0) -> Iterable[Edge]:
        return self.pairs
