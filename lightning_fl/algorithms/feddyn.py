"""FedDyn: dynamic regularisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from lightning_fl.algorithms.base import Algorithm, Weighting, check_hyperparameter
from lightning_fl.algorithms.fedprox import add_proximal
from lightning_fl.algorithms.registry import register
from lightning_fl.tree import add, subtract, zeros_like
from lightning_fl.types import Aggregate, Context, LocalRun, State, Tree, Update


@register("feddyn")
@dataclass(frozen=True)
class FedDyn(Algorithm):
    r"""FedDyn: a linear and a proximal term in each client's loss align the clients' optima with the global one.

    .. math::
        g &\leftarrow g - g_i + \alpha (y - x) \\
        g_i &\leftarrow g_i - \alpha (y_i - x) \\
        h &\leftarrow h - \frac{\alpha}{N} \sum_i (y_i - x), \qquad
        x \leftarrow \mathrm{mean}_i \, y_i - h / \alpha

    A client that solves its local problem exactly ends with :math:`g_i = \nabla F_i(y_i)`, so many local steps help. An
    inexact solution slows convergence but does not move the optimum, as long as server and clients use the same
    changes. What reaches the server other than it was sent is missing in :math:`h` for good, so compression, noise,
    staleness weights and robust rules are refused. The server's :math:`h` is the mean of the
    :math:`g_i` of all :math:`N` clients. This is the paper's algorithm, in which all clients have the same weight; the
    authors' code divides each client's :math:`\alpha` by its share of the examples. With ``weighting="examples"`` the
    mean and :math:`h` are weighted, which is exact if all clients take part.

    Args:
        alpha: The strength :math:`\alpha` of the proximal term. Default 0.01; the paper tries 0.001 to 0.1. Local
            training needs a learning rate well below :math:`2 / \alpha`.

    Raises:
        ValueError: If ``alpha`` is not positive.

    Reference:
        Acar et al., "Federated Learning Based on Dynamic Regularization", ICLR 2021.
    """

    alpha: float = 0.01

    weighting: ClassVar[Weighting] = "uniform"
    needs_exact_deltas: ClassVar[bool] = True
    keeps_client_state: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_hyperparameter(self, "alpha", self.alpha > 0, "a positive number (for alpha=0 use FedAvg)")

    def server_init(self, params: Tree, population: int) -> State:
        return {"params": params, "gradient": zeros_like(params)}

    def client_init(self, server: State, client: State | None, probe: Any = None) -> Context:
        gradient = client["gradient"] if client else zeros_like(server["params"])
        return {"params": server["params"], "gradient": gradient}

    def grad_transform(self, grads: Tree, params: Tree, ctx: Context) -> Tree:
        grads = add_proximal(grads, params, ctx["params"], self.alpha)
        return add(grads, ctx["gradient"], alpha=-1)

    def client_finish(
        self, params: Tree, ctx: Context, client: State | None, run: LocalRun
    ) -> tuple[Update, State | None]:
        delta = subtract(params, ctx["params"])
        return Update(delta=delta), {"gradient": add(ctx["gradient"], delta, alpha=-self.alpha)}

    def server_update(self, server: State, aggregate: Aggregate) -> State:
        # The paper divides by all N clients: those that did not take part did not change their g_i.
        share = aggregate.num_clients / aggregate.population
        gradient = add(server["gradient"], aggregate.delta, alpha=-self.alpha * share / aggregate.weight)
        mean = add(server["params"], aggregate.delta, alpha=1 / aggregate.weight)
        return {"params": add(mean, gradient, alpha=-1 / self.alpha), "gradient": gradient}
