"""DSGD: nodes train, then mix their models with those of their neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightning_fl.algorithms.decentralized import Decentralized, Mixing
from lightning_fl.algorithms.registry import register
from lightning_fl.tree import add
from lightning_fl.types import State, Tree


@register("dsgd")
@dataclass(frozen=True)
class DSGD(Decentralized):
    r"""DSGD: each client trains its own model and, at the end of every round, mixes it with those of its neighbours.

    .. math:: x_i \leftarrow \sum_j W_{ij}(t) \, y_j

    With a complete graph it is federated averaging. With fewer edges, or several local steps, the nodes converge to
    different points near the optimum: :class:`D2` and :class:`GradientTracking` remedy that. With
    ``fl.topologies.Edges`` it is HierFAVG.

    Args:
        topology: Who mixes with whom. Default: all with all.

    Raises:
        ValueError: When training starts, if the graph is directed or does not connect the clients.

    Reference:
        Lian et al., "Can Decentralized Algorithms Outperform Centralized Algorithms? A Case Study for Decentralized
        Parallel Stochastic Gradient Descent", NeurIPS 2017.
    """

    def mix(self, state: State, deltas: Tree, mixing: Mixing) -> dict[str, Any]:
        return {"nodes": mixing.of(add(state["nodes"], deltas))}
