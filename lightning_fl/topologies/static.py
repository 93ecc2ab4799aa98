"""Static graphs, the same in all rounds."""

# No `from __future__ import annotations`: jsonargparse would resolve the strings in the modules of the subclasses.
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from lightning_fl.topologies.topology import Edge, Topology


@dataclass(frozen=True)
class Complete(Topology):
    """Every node mixes with all others: after a round each has the weighted mean, as with a server."""

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
    """A ring without the edge between the last and the first node."""

    def edges(self, num_nodes: int, round: int = 0) -> Iterable[Edge]:
        return ((node, node + 1) for node in range(num_nodes - 1))


@dataclass(frozen=True)
class Star(Topology):
    """All nodes mix with the first one."""

    def edges(self, num_nodes: int, round: int = 0) -> Iterable[Edge]:
        return ((0, node) for node in range(1, num_nodes))


@dataclass(frozen=True)
class Grid(Topology):
    """Nodes in a grid, row by row; each mixes with those above, below, left and right of it.

    Args:
        rows: Number of rows.
        columns: Number of columns.
    """

    rows: int
    columns: int

    wraps = False
    """Whether the first and last rows, and the first and last columns, are adjacent."""

    def edges(self, num_nodes: int, round: int = 0) -> Iterable[Edge]:
        if self.rows * self.columns != num_nodes:
            raise ValueError(
                f"{self!r} has {self.rows * self.columns} nodes, but the federation has {num_nodes} clients. Choose "
                "rows and columns whose product is the number of clients."
            )
        for row in range(self.rows):
            for column in range(self.columns):
                for below, right in ((row + 1, column), (row, column + 1)):
                    if self.wraps or (below < self.rows and right < self.columns):
                        other = below % self.rows * self.columns + right % self.columns
                        yield row * self.columns + column, other


@dataclass(frozen=True)
class Torus(Grid):
    """A grid without a border: its first and last rows, and its first and last columns, are adjacent.

    Args:
        rows: Number of rows.
        columns: Number of columns.
    """

    wraps = True


@dataclass(frozen=True)
class Hypercube(Topology):
    """Nodes mix with those whose indices differ in one binary digit; the number of nodes must be a power of 2."""

    def edges(self, num_nodes: int, round: int = 0) -> Iterable[Edge]:
        if num_nodes & (num_nodes - 1):
            raise ValueError(f"Hypercube() needs a power of 2 as the number of clients, but found {num_nodes}.")
        bits = range(num_nodes.bit_length() - 1)
        return ((node, node ^ (1 << bit)) for node in range(num_nodes) for bit in bits)


@dataclass(frozen=True)
class Graph(Topology):
    """A graph given by its edges.

    Args:
        pairs: Pairs of nodes, by their positions in the order of the clients' ids.
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
