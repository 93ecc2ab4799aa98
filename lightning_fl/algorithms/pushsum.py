"""Push-sum: decentralised training over a directed graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_fl.algorithms.decentralized import Decentralized, Mixing
from lightning_fl.algorithms.registry import register
from lightning_fl.tree import add, tree_map
from lightning_fl.types import State, Tree


@register("pushsum")
@dataclass(frozen=True)
class PushSum(Decentralized):
    r"""Push-sum (SGP): nodes send to their successors only, along with a weight that corrects the mean.

    .. math:: z \leftarrow A (z + \Delta), \qquad w \leftarrow A w, \qquad x_i = z_i / w_i

    The columns of :math:`A` add up to 1: each node divides its sum :math:`z_i` and weight :math:`w_i` equally among
    itself and its successors, and need not know who sends to it. :math:`\Delta_i = y_i - x_i` is the change by local
    training.

    Args:
        topology: Who sends to whom, such as ``fl.topologies.Exponential()`` or a directed ``Graph``. Default: all to
            all.

    Raises:
        ValueError: When training starts, if the graph is not strongly connected.

    Reference:
        Assran et al., "Stochastic Gradient Push for Distributed Deep Learning", ICML 2019.
    """

    def check_matrix(self, population: int, weights: Tensor | None) -> None:
        self.topology.push_matrix(population)

    def init_more(self, nodes: Tree) -> dict[str, Any]:
        first = next(iter(nodes.values()))
        mass = torch.ones(len(first), dtype=torch.float64, device=first.device)
        return {"sums": {name: own.clone() for name, own in nodes.items()}, "mass": mass}

    def matrix_of(self, population: int, round: int, weights: Tensor) -> Tensor:
        return self.topology.push_matrix(population, round)

    def rho(self, population: int) -> float:
        return float(torch.linalg.eigvals(self.topology.push_matrix(population)).abs().sort().values[-2:][0])

    def mix(self, state: State, deltas: Tree, mixing: Mixing) -> dict[str, Any]:
        sums, mass = mixing.of(add(state["sums"], deltas)), mixing.matrix @ state["mass"]
        return {"sums": sums, "mass": mass, "nodes": tree_map(lambda own: _divided(own, mass), sums)}


def _divided(nodes: Tensor, mass: Tensor) -> Tensor:
    return nodes / mass.to(nodes.dtype).view(-1, *[1] * (nodes.dim() - 1))
