"""D2: decentralised training that corrects for clients with different data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_fl.algorithms.decentralized import Decentralized, Mixing
from lightning_fl.algorithms.registry import register
from lightning_fl.tree import add, subtract, zeros_like
from lightning_fl.types import State, Tree


@register("d2")
@dataclass(frozen=True)
class D2(Decentralized):
    r"""D2: DSGD corrected by the previous round, so that nodes agree at the optimum whatever data they have.

    .. math:: x^{t+1} = W \left( 2 x^t - x^{t-1} + \Delta^t - \Delta^{t-1} \right), \qquad x^1 = W (x^0 + \Delta^0)

    :math:`\Delta_i = y_i - x_i` is the change by local training; with one step of plain SGD it is :math:`-\eta` times
    the gradient, the case that the paper analyses. More local steps leave a client drift that is not corrected. The
    mixing matrix must be symmetric (:math:`p_i W_{ij} = p_j W_{ji}` if the clients' weights :math:`p` differ), the same
    in all rounds, and have no eigenvalue at or below -1/3. All clients take part in each round; otherwise the
    differences would mix the work of different clients.

    Args:
        topology: Who mixes with whom. Default: all with all.

    Raises:
        ValueError: When training starts, if the mixing matrix does not meet these conditions or the graph is not
            connected.

    Reference:
        Tang et al., "D2: Decentralized Training over Decentralized Data", ICML 2018.
    """

    def check_matrix(self, population: int, weights: Tensor | None) -> None:
        matrix = self.topology.matrix(population, weights=weights)
        others = (self.topology.matrix(population, round, weights) for round in (1, 2, 3))
        flows = matrix if weights is None else weights.double()[:, None] * matrix
        if not torch.allclose(flows, flows.t(), rtol=1e-9, atol=1e-12) or not all(
            torch.equal(matrix, other) for other in others
        ):
            raise ValueError(
                f"D2 needs a symmetric mixing matrix that is the same in all rounds, which {self.topology!r} does not "
                "have. Use 'gradienttracking' or 'dsgd', or a static topology."
            )
        lowest = float(torch.linalg.eigvals(matrix).real.min())
        if lowest <= -1 / 3 + 1e-9:
            raise ValueError(
                f"D2 diverges with {self.topology!r} among {population} clients: its lowest eigenvalue is {lowest:.4f} "
                f"and must be above -1/3. Use fl.topologies.Lazy({self.topology!r})."
            )

    def init_more(self, nodes: Tree) -> dict[str, Any]:
        # With x^{-1} = x^0 and a previous change of 0, the first round is W (x^0 + delta).
        return {"last_nodes": {name: own.clone() for name, own in nodes.items()}, "last_deltas": zeros_like(nodes)}

    def mix(self, state: State, deltas: Tree, mixing: Mixing) -> dict[str, Any]:
        nodes = state["nodes"]
        moved = add(subtract(nodes, state["last_nodes"]), subtract(deltas, state["last_deltas"]))
        return {"nodes": mixing.of(add(nodes, moved)), "last_nodes": nodes, "last_deltas": deltas}
