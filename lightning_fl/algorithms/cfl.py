"""CFL: clients whose updates point in different directions are split into clusters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_fl.algorithms.base import check_hyperparameter
from lightning_fl.algorithms.registry import register
from lightning_fl.algorithms.replicas import Replicas, as_rows
from lightning_fl.tree import tree_map
from lightning_fl.types import State, Tree


@register("cfl")
@dataclass(frozen=True)
class CFL(Replicas):
    r"""CFL: federated averaging that splits a cluster in two once it has converged but its clients disagree.

    A cluster averages its clients' changes :math:`\Delta_i`. It is split if

    .. math::
        \lVert \mathrm{mean}_i \Delta_i \rVert < \varepsilon_1
        \quad \text{and} \quad \max_i \lVert \Delta_i \rVert > \varepsilon_2

    into the two parts A and B with the smallest cross-cluster similarity
    :math:`\max_{i \in A, j \in B} \cos(\Delta_i, \Delta_j)`; each part continues from the cluster's model. The server
    sees each client's update, and holds one model per client.

    Args:
        eps1: The norm :math:`\varepsilon_1` of the mean change below which a cluster has converged, in units of the
            parameters. Default 0.4.
        eps2: The norm :math:`\varepsilon_2` of a client's change above which the client has not converged. Default 1.6.
            Both depend on model and learning rate: the paper takes them from the norms of the first rounds, which the
            history has.
        min_size: Smallest number of clients of a cluster that may be split. Default 2.
        server_lr: The server's learning rate. Default 1.

    Raises:
        ValueError: If ``eps1`` or ``eps2`` is negative, or ``min_size`` below 2.

    Reference:
        Sattler, Müller and Samek, "Clustered Federated Learning: Model-Agnostic Distributed Multitask Optimization
        under Privacy Constraints", IEEE TNNLS 2021.
    """

    eps1: float = 0.4
    eps2: float = 1.6
    min_size: int = 2
    server_lr: float = 1.0

    def __post_init__(self) -> None:
        check_hyperparameter(self, "eps1", self.eps1 >= 0, "a number that is not negative")
        check_hyperparameter(self, "eps2", self.eps2 >= 0, "a number that is not negative")
        check_hyperparameter(self, "min_size", self.min_size >= 2, "at least 2")

    def init_more(self, nodes: Tree) -> dict[str, Any]:
        first = next(iter(nodes.values()))
        return {"groups": torch.zeros(len(first), dtype=torch.int64, device=first.device)}

    def update_nodes(self, server: State, deltas: Tree, weights: Tensor) -> dict[str, Any]:
        rows, groups, nodes = as_rows(deltas), server["groups"].clone(), server["nodes"]
        shares = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=rows.device)
        for group in groups.unique().tolist():
            members = (groups == group).nonzero()[:, 0]
            own = weights[members]
            if own.sum() > 0:
                shares[members[:, None], members] = (own / own.sum()).double()
            settled = (shares[members[0]] @ rows).norm() < self.eps1
            if settled and len(members) >= self.min_size and rows[members].norm(dim=1).max() > self.eps2:
                groups[members[second_half(rows[members])]] = groups.max() + 1
        moved = tree_map(lambda own: torch.tensordot(shares.to(own.dtype), own, dims=1), deltas)
        nodes = {name: own + self.server_lr * moved[name] for name, own in nodes.items()}
        return {"nodes": nodes, "groups": groups}


def second_half(rows: Tensor) -> Tensor:
    """Splits rows into two parts; returns the indices of the part that does not contain the first row.

    Single-linkage clustering: the most similar pairs are merged first until two parts are left. No other split has a
    smaller maximum cosine similarity across the parts.

    Args:
        rows: Updates ``[n, elements]``; a row of zeros has similarity 0 to every other.
    """
    unit = rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-30)
    size, alike = len(rows), unit @ unit.t()
    part, left = torch.arange(size, device=rows.device), size
    first, second = torch.triu_indices(size, size, 1, device=rows.device)
    for pair in alike[first, second].argsort(descending=True, stable=True).tolist():
        one, other = part[first[pair]].item(), part[second[pair]].item()
        if left > 2 and one != other:
            part[part == other] = one
            left -= 1
    return (part != part[0]).nonzero()[:, 0]
