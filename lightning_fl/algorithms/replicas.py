"""Base class of algorithms whose server keeps one model per client."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_fl.algorithms.base import Algorithm, Weighting
from lightning_fl.tree import tree_map
from lightning_fl.types import Aggregate, Context, State, Tree


@dataclass(frozen=True)
class Replicas(Algorithm):
    r"""Base of the algorithms whose server keeps one model per client.

    All start from the same model. The models, each tensor stacked over the clients in the order of their ids, are the
    entry ``"nodes"`` of the state; ``"params"`` is their weighted mean, which validation and checkpoints see. All
    clients take part in each round; the change of one whose update was refused or lost is zero.
    """

    weighting: ClassVar[Weighting] = "uniform"
    knows_index: ClassVar[bool] = True
    keeps_nodes: ClassVar[bool] = True

    def server_init(self, params: Tree, population: int) -> State:
        nodes = tree_map(lambda tensor: tensor.expand(population, *tensor.shape).clone(), params)
        return {"params": params, "nodes": nodes, **self.init_more(nodes)}

    def init_more(self, nodes: Tree) -> dict[str, Any]:
        """Further initial entries of the state."""
        return {}

    def client_init(self, server: State, client: State | None, probe: Any = None) -> Context:
        return {"params": {name: tensor[server["index"]] for name, tensor in server["nodes"].items()}}

    def server_update(self, server: State, aggregate: Aggregate) -> State:
        weights = aggregate.node_weights
        assert weights is not None, "needs an aggregator that passes on each client's update, such as Nodes"
        state = {**server, **self.update_nodes(server, aggregate.nodes, weights)}
        mean = tree_map(lambda own: torch.tensordot(weights.to(own.dtype), own, dims=1), state["nodes"])
        return {**state, "params": mean}

    @abstractmethod
    def update_nodes(self, server: State, deltas: Tree, weights: Tensor) -> dict[str, Any]:
        """The updated entries of the state, ``"nodes"`` among them.

        Args:
            server: The state before the round.
            deltas: The changes of the models by local training, each tensor ``[n, ...]``.
            weights: The clients' weights ``[n]``, which add up to 1.
        """


def as_rows(nodes: Tree) -> Tensor:
    """The models as rows, float64 ``[n, elements]``."""
    return torch.cat([own.reshape(len(own), -1).double() for own in nodes.values()], dim=1)
