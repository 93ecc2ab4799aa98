"""SCAFFOLD: control variates against client drift."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch.optim import SGD, Optimizer

from lightning_fl.algorithms.base import Algorithm, ProbeKind, Weighting, check_hyperparameter
from lightning_fl.algorithms.registry import register
from lightning_fl.tree import add, subtract, zeros_like
from lightning_fl.types import Aggregate, Context, LocalRun, State, Tree, Update


@register("scaffold")
@dataclass(frozen=True)
class Scaffold(Algorithm):
    r"""SCAFFOLD: every local gradient is corrected by the difference of the server's and the client's control variate.

    .. math::
        g &\leftarrow g - c_i + c \\
        c_i^+ &= \nabla F_i(x) \quad \text{(option I)} \qquad \text{or} \qquad
        c_i^+ = c_i - c + \frac{x - y_i}{\sum_k \eta_k a_k} \quad \text{(option II)} \\
        x &\leftarrow x + \eta_s \, \mathrm{mean}_i (y_i - x), \qquad
        c \leftarrow c + \frac{1}{N} \sum_i (c_i^+ - c_i)

    Option II divides by the sum of the local learning rates where the paper has :math:`K \eta`, so it accounts for a
    learning-rate schedule; if the sum is 0, a client keeps its control variate. The paper derives it for plain SGD,
    where :math:`a_k = 1`. With momentum :math:`a_k` is how often the gradient of step :math:`k` counts, as in FedNova,
    so that the control variate is still a mean of gradients; momentum that a client keeps from an earlier round is left
    out. Other frameworks divide by the last learning rate, or weight the control variates by examples.

    Args:
        server_lr: The server's learning rate :math:`\eta_s`. Default 1.
        option: How a client updates its control variate. Default 2: from its local steps, at no extra cost. 1: the
            gradient of its data at the global model, which works with any local optimizer but takes an additional pass
            over the data per round.

    Raises:
        ValueError: If ``option`` is neither 1 nor 2.

    Reference:
        Karimireddy et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", ICML 2020.
    """

    server_lr: float = 1.0
    option: int = 2

    weighting: ClassVar[Weighting] = "uniform"
    keeps_client_state: ClassVar[bool] = True
    client_keys: ClassVar[tuple[str, ...]] = ("params", "control")

    def __post_init__(self) -> None:
        check_hyperparameter(self, "option", self.option in (1, 2), "1 or 2")

    @property
    def is_elementwise(self) -> bool:  # type: ignore[override]
        """Option I measures a gradient outside the training step."""
        return self.option == 2

    @property
    def probe(self) -> ProbeKind | None:  # type: ignore[override]
        """Option I needs the gradient at the global model."""
        return "grad" if self.option == 1 else None

    def check_optimizers(self, optimizers: Sequence[Optimizer]) -> None:
        if self.option == 2 and not all(type(optimizer) is SGD for optimizer in optimizers):
            names = ", ".join(type(optimizer).__name__ for optimizer in optimizers)
            warnings.warn(
                f"SCAFFOLD's control variate is derived for plain SGD, found {names}: with adaptive steps it is not "
                "a mean of gradients and may not correct the drift. Use torch.optim.SGD, or Scaffold(option=1).",
                stacklevel=2,
            )

    def server_init(self, params: Tree, population: int) -> State:
        return {"params": params, "control": zeros_like(params)}

    def aux_like(self, params: Tree) -> Mapping[str, Tree]:
        return {"control": params}

    def client_init(self, server: State, client: State | None, probe: Any = None) -> Context:
        control = client["control"] if client else zeros_like(server["params"])
        correction = subtract(server["control"], control)
        context = {"params": server["params"], "control": control, "correction": correction}
        return context if probe is None else {**context, "gradient": probe}

    def grad_transform(self, grads: Tree, params: Tree, ctx: Context) -> Tree:
        return add(grads, ctx["correction"])

    def client_finish(
        self, params: Tree, ctx: Context, client: State | None, run: LocalRun
    ) -> tuple[Update, State | None]:
        delta = subtract(params, ctx["params"])
        # Option I: the measured gradient. Option II: from the local steps; -correction is c_i - c.
        control = ctx.get("gradient") or {
            name: -ctx["correction"][name] - change / run.lr_sum[name] if run.lr_sum[name] else ctx["control"][name]
            for name, change in delta.items()
        }
        return Update(delta=delta, aux={"control": subtract(control, ctx["control"])}), {"control": control}

    def server_update(self, server: State, aggregate: Aggregate) -> State:
        server = super().server_update(server, aggregate)
        return {**server, "control": add(server["control"], aggregate.aux["control"], alpha=1 / aggregate.population)}
