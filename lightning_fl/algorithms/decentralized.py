"""Base class of decentralised algorithms: every client is a node with a model of its own."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from lightning_fl.algorithms.base import Algorithm, Weighting
from lightning_fl.topologies import Complete, Topology
from lightning_fl.tree import tree_map
from lightning_fl.types import Aggregate, Context, Neighbours, State, Tree


class Mixing(NamedTuple):
    """The mixing step of a round.

    Attributes:
        matrix: The mixing matrix ``[n, n]``, float64.
        neighbours: Exchanges rows with other ranks where each rank holds the row of its own node only; else None.
    """

    matrix: Tensor
    neighbours: Neighbours | None = None

    def of(self, nodes: Tree) -> Tree:
        """``matrix @ nodes``, for each tensor ``[n, ...]``."""
        if self.neighbours is not None:
            return self.neighbours.mix(self.matrix, nodes)
        return tree_map(lambda own: torch.tensordot(self.matrix.to(own.dtype), own, dims=1), nodes)


@dataclass(frozen=True)
class Decentralized(Algorithm):
    r"""Base of the algorithms that train one model per client and mix neighbours' models after each round.

    All nodes start from the same model. Their models, each tensor stacked over the clients in the order of their ids,
    are the entry ``"nodes"`` of the state; ``"params"`` is their weighted mean, which validation and checkpoints see.
    All clients take part in each round; one whose update was refused or lost mixes its unchanged model, with the weight
    of its data.

    Where each silo is a rank of its own, it holds only the row of its own node and sends it to its neighbours only;
    ``"params"`` is then its own model, until :meth:`join` gathers all rows.

    Args:
        topology: Who mixes with whom. Default: all with all.
    """

    topology: Topology = field(default_factory=Complete)

    weighting: ClassVar[Weighting] = "uniform"
    knows_index: ClassVar[bool] = True
    keeps_nodes: ClassVar[bool] = True
    mixes_neighbours: ClassVar[bool] = True

    def server_init(self, params: Tree, population: int) -> State:
        self.topology.check(population)
        self.check_matrix(population, None)
        state = {"params": params, "nodes": tree_map(lambda tensor: _repeat(tensor, population), params)}
        zero = next(iter(params.values())).new_zeros((), dtype=torch.int64)
        return {**state, "round": zero, **self.init_more(state["nodes"])}

    def check_matrix(self, population: int, weights: Tensor | None) -> None:
        """Checks that the algorithm converges with the topology's mixing matrices.

        Args:
            population: Number of nodes.
            weights: Their weights, which are known at the end of the first round. None: not yet known.

        Raises:
            ValueError: If it does not.
        """
        self.topology.matrix(population, weights=weights)

    def init_more(self, nodes: Tree) -> dict[str, Any]:
        """Further initial entries of the state."""
        return {}

    @abstractmethod
    def mix(self, state: State, deltas: Tree, mixing: Mixing) -> dict[str, Any]:
        """The updated entries of the state, ``"nodes"`` among them.

        Args:
            state: The state before the round.
            deltas: The changes of the nodes' models by local training, each tensor ``[n, ...]``.
            mixing: The round's mixing step; the only way in which one node's rows may enter another's.
        """

    def matrix_of(self, population: int, round: int, weights: Tensor) -> Tensor:
        """The round's mixing matrix."""
        return self.topology.matrix(population, round, weights=weights)

    def client_init(self, server: State, client: State | None, probe: Any = None) -> Context:
        return {"params": {name: tensor[server["index"]] for name, tensor in server["nodes"].items()}}

    def server_update(self, server: State, aggregate: Aggregate) -> State:
        weights = aggregate.node_weights
        assert weights is not None, "needs an aggregator that passes on each client's update, such as Nodes"
        round, known = int(server["round"]), weights.cpu()
        if round == 0:
            self.check_matrix(len(weights), known)
        matrix = self.matrix_of(len(weights), round, known).to(weights.device)
        mixing, neighbours = Mixing(matrix, aggregate.neighbours), aggregate.neighbours
        state = {**server, **self.mix(server, aggregate.nodes, mixing), "round": server["round"] + 1}
        if neighbours is not None:
            return {**state, "params": {name: own[neighbours.place] for name, own in state["nodes"].items()}}
        return {**state, "params": tree_map(lambda own: _weighted_sum(weights, own), state["nodes"])}

    def join(self, server: State, aggregate: Aggregate) -> State:
        """The state with the rows of all nodes, gathered from ranks that hold only their own."""
        neighbours, weights = aggregate.neighbours, aggregate.node_weights
        assert neighbours is not None
        assert weights is not None
        trees = {key: dict(own) for key, own in server.items() if isinstance(own, Mapping) and key != "params"}
        state = {**server, **{key: neighbours.gather(own) for key, own in trees.items()}}
        return {**state, "params": tree_map(lambda own: _weighted_sum(weights, own), state["nodes"])}

    def report(self, server: State) -> Mapping[str, float]:
        r"""The consensus distance :math:`\sqrt{\mathrm{mean}_i \lVert x_i - \bar x \rVert^2}`, and :meth:`rho`."""
        return {"consensus": consensus(server["nodes"]), "rho": self.rho(len(next(iter(server["nodes"].values()))))}

    def rho(self, population: int) -> float:
        """The factor by which a round of mixing multiplies the nodes' disagreement."""
        return self.topology.rho(population)


def consensus(nodes: Tree) -> float:
    """The root mean square distance of the nodes from their mean."""
    apart = [(own - own.mean(0)).double().square().sum() for own in nodes.values()]
    return float(torch.stack(apart).sum() / len(next(iter(nodes.values())))) ** 0.5


def _repeat(tensor: Tensor, times: int) -> Tensor:
    return tensor.expand(times, *tensor.shape).clone()


def _weighted_sum(weights: Tensor, nodes: Tensor) -> Tensor:
    return torch.tensordot(weights.to(nodes.dtype), nodes, dims=1)
