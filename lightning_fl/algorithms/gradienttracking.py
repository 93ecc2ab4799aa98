"""Gradient tracking: nodes follow an estimate of the mean of all clients' changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightning_fl.algorithms.decentralized import Decentralized, Mixing
from lightning_fl.algorithms.registry import register
from lightning_fl.tree import add, subtract, zeros_like
from lightning_fl.types import State, Tree


@register("gradienttracking")
@dataclass(frozen=True)
class GradientTracking(Decentralized):
    r"""Gradient tracking: each node moves by its estimate of the mean change, so that nodes agree at the optimum.

    .. math::
        z^t &= W z^{t-1} + \Delta^t - \Delta^{t-1}, \qquad z^0 = \Delta^0 \\
        x^{t+1} &= W (x^t + z^t)

    :math:`\Delta_i = y_i - x_i` is the change by local training. With one step of plain SGD the nodes converge to the
    optimum; more local steps leave a client drift that is not corrected. It also works with graphs that change from
    round to round. It sends two models per round, DSGD one.

    Args:
        topology: Who mixes with whom. Default: all with all.

    Raises:
        ValueError: When training starts, if the graph is directed or does not connect the clients.

    Reference:
        Nedic, Olshevsky and Shi, "Achieving Geometric Convergence for Distributed Optimization over Time-Varying
        Graphs", SIAM Journal on Optimization 2017.
    """

    def init_more(self, nodes: Tree) -> dict[str, Any]:
        return {"tracker": zeros_like(nodes), "last_deltas": zeros_like(nodes)}

    def mix(self, state: State, deltas: Tree, mixing: Mixing) -> dict[str, Any]:
        tracker = add(mixing.of(state["tracker"]), subtract(deltas, state["last_deltas"]))
        return {"nodes": mixing.of(add(state["nodes"], tracker)), "tracker": tracker, "last_deltas": deltas}
