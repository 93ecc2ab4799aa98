"""FedExP: an adaptive server step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from lightning_fl.algorithms.base import Algorithm, AuxRole, Weighting, check_hyperparameter
from lightning_fl.algorithms.registry import register
from lightning_fl.tree import add, scalar_like, squared_norm, subtract
from lightning_fl.types import Aggregate, Context, LocalRun, State, Tree, Update


@register("fedexp")
@dataclass(frozen=True)
class FedExP(Algorithm):
    r"""FedExP: the more the clients' changes differ in direction, the longer the server's step.

    .. math::
        \Delta &= \mathrm{mean}_i \, \Delta_i, \qquad \Delta_i = y_i - x \\
        x &\leftarrow x + \max\left(1, \frac{\mathrm{mean}_i \lVert \Delta_i \rVert^2}
        {2 (\lVert \Delta \rVert^2 + \varepsilon)}\right) \Delta

    In the paper all clients have the same weight; with ``weighting="examples"`` both means are weighted. Long steps
    make the model oscillate from round to round, so the paper evaluates the average of the last two models; here the
    model is the last one. The step compares the norms of what clients have computed with the norm of what the
    server gets, so transforms that change updates, and robust rules, are refused.

    Args:
        eps: The constant :math:`\varepsilon` that bounds the step when the changes cancel out. Default 0.001. If the
            model oscillates, raise it towards the squared norm of a client's change. Infinity is FedAvg.

    Raises:
        ValueError: If ``eps`` is not positive.

    Reference:
        Jhunjhunwala et al., "FedExP: Speeding Up Federated Averaging via Extrapolation", ICLR 2023.
    """

    eps: float = 1e-3

    weighting: ClassVar[Weighting] = "uniform"
    aux_role: ClassVar[AuxRole] = "divisor"
    needs_exact_deltas: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_hyperparameter(self, "eps", self.eps > 0, "a positive number")

    def aux_like(self, params: Tree) -> Mapping[str, Tree]:
        return {"squares": {"sum": scalar_like(params)}}

    def client_finish(
        self, params: Tree, ctx: Context, client: State | None, run: LocalRun
    ) -> tuple[Update, State | None]:
        delta = subtract(params, ctx["params"])
        return Update(delta=delta, aux={"squares": {"sum": run.weight * squared_norm(delta)}}), client

    def server_update(self, server: State, aggregate: Aggregate) -> State:
        change = aggregate.mean()
        mean_of_squares = aggregate.aux["squares"]["sum"] / aggregate.weight
        step = float(mean_of_squares / (2 * (squared_norm(change) + self.eps)))
        return {**server, "params": add(server["params"], change, alpha=max(1.0, step))}
