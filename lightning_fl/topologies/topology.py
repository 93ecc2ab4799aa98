"""The interface of a topology: a mixing matrix for each round."""

# No `from __future__ import annotations`: jsonargparse would resolve the strings in the modules of the subclasses.
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

Edge = tuple[int, int]


class Topology(ABC):
    r"""Which nodes mix their models: :math:`x_i \leftarrow \sum_j W_{ij}(t) \, x_j`, as a function of the round.

    Nodes are the clients in the order of their ids. A topology of your own is a frozen dataclass with :meth:`edges`.
    """

    @abstractmethod
    def edges(self, num_nodes: int, round: int = 0) -> Iterable[Edge]:
        """The edges ``(from, to)`` along which nodes send in a round, without loops.

        Raises:
            ValueError: If there is no such graph with ``num_nodes`` nodes.
        """

    @property
    def is_directed(self) -> bool:
        """Whether edges go one way only; such a graph needs push-sum, unless its matrix is doubly stochastic."""
        return False

    def period(self, num_nodes: int) -> int:
        """The number of rounds after which the matrices repeat; 1 for a static or random graph."""
        return 1

    def links(self, num_nodes: int, round: int = 0) -> Tensor:
        """Whether node i receives from node j, bool ``[num_nodes, num_nodes]``, without the diagonal.

        Raises:
            ValueError: If an edge leads to a node that does not exist.
        """
        found = torch.zeros(num_nodes, num_nodes, dtype=torch.bool)
        for source, target in self.edges(num_nodes, round):
            if not (0 <= source < num_nodes and 0 <= target < num_nodes):
                raise ValueError(f"{self!r} has the edge ({source}, {target}), but the nodes are 0 to {num_nodes - 1}.")
            found[target, source] = True
            if not self.is_directed:
                found[source, target] = True
        return found.fill_diagonal_(False)

    def matrix(self, num_nodes: int, round: int = 0, weights: Tensor | None = None) -> Tensor:
        r"""The mixing matrix :math:`W`, which keeps the weighted mean of models: float64 ``[num_nodes, num_nodes]``.

        Its rows add up to 1, and :math:`\sum_i p_i W_{ij} = p_j` for weights :math:`p`: with equal ones its columns add
        up to 1 too. By default Metropolis-Hastings, :math:`W_{ij} = \min(1 / (1 + d_i), \, p_j / (p_i (1 + d_j)))` for
        neighbours of degrees :math:`d`, and the rest on the diagonal; a node of weight 0 passes on what it hears as one
        of mean weight.

        Args:
            num_nodes: Number of nodes.
            round: Number of the round, from 0.
            weights: The nodes' weights in the mean of all models; they add up to 1. None: uniform.

        Raises:
            ValueError: If no such matrix follows from the graph, because it is directed.

        Reference:
            Hastings, "Monte Carlo Sampling Methods Using Markov Chains and Their Applications", Biometrika 1970.
        """
        if self.is_directed:
            raise ValueError(f"{self!r} is directed: use algorithm='pushsum', or a graph whose edges go both ways.")
        links = self.links(num_nodes, round)
        offers = 1 / (1 + links.sum(1).double())
        own = torch.ones(num_nodes, dtype=torch.float64) if weights is None else weights.double()
        # Whoever has no data changes nothing, so that any weight keeps the others' optimum; with 0 it would cut a path.
        own = torch.where(own > 0, own, own.sum() / (own > 0).sum())
        found = torch.where(links, torch.minimum(offers[:, None], own / own[:, None] * offers), 0.0)
        return found + torch.diag(1 - found.sum(1))

    def push_matrix(self, num_nodes: int, round: int = 0) -> Tensor:
        """The matrix of push-sum: each node divides its values among itself and its successors; columns add up to 1."""
        found = self.links(num_nodes, round).double() + torch.eye(num_nodes, dtype=torch.float64)
        return found / found.sum(0)

    def rho(self, num_nodes: int) -> float:
        r"""The factor by which a round reduces the nodes' disagreement, :math:`\lVert W - 1 1^T / n \rVert_2`.

        For time-varying matrices, the mean over a period. 1: the nodes never agree; 0: they agree after one period.
        """
        product, rounds = torch.eye(num_nodes, dtype=torch.float64), self.period(num_nodes)
        for round in range(rounds):
            product = self.matrix(num_nodes, round) @ product
        norm = torch.linalg.matrix_norm(product - torch.full_like(product, 1 / num_nodes), 2)
        return float(norm.clamp(min=0)) ** (1 / rounds)

    def check(self, num_nodes: int) -> None:
        """Checks that information from each node reaches every other.

        Raises:
            ValueError: If it does not.
        """
        reach = torch.eye(num_nodes, dtype=torch.bool)
        for round in range(self.period(num_nodes)):
            reach |= self.links(num_nodes, round)
        for _ in range(num_nodes.bit_length()):
            reach = (reach.double() @ reach.double()) > 0
        if not reach.all():
            target, source = (~reach).nonzero()[0].tolist()
            raise ValueError(
                f"{self!r} does not connect {num_nodes} nodes: nothing from node {source} ever reaches node {target}. "
                "Add edges, or train the parts as separate federations."
            )


@dataclass(frozen=True)
class Lazy(Topology):
    r"""Half of another topology's mixing, :math:`(I + W) / 2`, whose eigenvalues are not negative, as D2 needs.

    Args:
        topology: The other topology.
    """

    topology: Topology

    @property
    def is_directed(self) -> bool:
        return self.topology.is_directed

    def edges(self, num_nodes: int, round: int = 0) -> Iterable[Edge]:
        return self.topology.edges(num_nodes, round)

    def period(self, num_nodes: int) -> int:
        return self.topology.period(num_nodes)

    def matrix(self, num_nodes: int, round: int = 0, weights: Tensor | None = None) -> Tensor:
        found = self.topology.matrix(num_nodes, round, weights)
        return (torch.eye(num_nodes, dtype=torch.float64) + found) / 2
