"""SCAFFOLD: control variates against client drift."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch.optim import SGD, Optimizer

from lightning_fl.algorithms.base import Algorithm, Weighting
from lightning_fl.algorithms.registry import register
from lightning_fl.tree import add, subtract, zeros_like
from lightning_fl.types import Aggregate, Context, LocalRun, State, Tree, Update


@register("scaffold")
@dataclass(frozen=True)
class Scaffold(Algorithm):
    r"""SCAFFOLD: every local gradient is corrected by the difference of the server's and the client's control.

    .. math::
        g &\leftarrow g - c_i + c \\
        c_i^+ &= c_i - c + \frac{x - y_i}{\sum_k \eta_k} \quad \text{(option II)} \\
        x &\leftarrow x + \eta_s \, \mathrm{mean}_i (y_i - x), \qquad
        c \leftarrow c + \frac{1}{N} \sum_i (c_i^+ - c_i)

    The sum of the learning rates of the local steps stands where the paper has :math:`K \eta`, so a learning-rate
    schedule is divided by what was really taken; where that is 0 a client keeps its control. The control is derived for
    plain SGD.

    Args:
        server_lr: The server's step :math:`\eta_s`.
        option: How a client renews its control; 2 reuses the local steps and costs nothing.

    Raises:
        ValueError: If ``option`` is not 2.

    Reference:
        Karimireddy et al., "SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", ICML 2020.
    """

    server_lr: float = 1.0
    option: int = 2

    weighting: ClassVar[Weighting] = "uniform"
    keeps_client_state: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.option != 2:
            raise ValueError(f"Scaffold got option={self.option}; only option 2 is available.")

    def check_optimizers(self, optimizers: Sequence[Optimizer]) -> None:
        plain = all(type(o) is SGD and all(group["momentum"] == 0 for group in o.param_groups) for o in optimizers)
        if not plain:
            names = ", ".join(type(optimizer).__name__ for optimizer in optimizers)
            warnings.warn(
                f"SCAFFOLD's control is derived for plain SGD, found {names}: with momentum or adaptive steps it is "
                "no gradient, and may not correct the drift. Use torch.optim.SGD without momentum.",
                stacklevel=2,
            )

    def server_init(self, params: Tree, population: int) -> State:
        return {"params": params, "control": zeros_like(params)}

    def aux_like(self, params: Tree) -> Mapping[str, Tree]:
        return {"control": params}

    def client_init(self, server: State, client: State | None, probe: object = None) -> Context:
        own = client["control"] if client else zeros_like(server["params"])
        return {"params": server["params"], "own": own, "correction": subtract(server["control"], own)}

    def grad_transform(self, grads: Tree, params: Tree, ctx: Context) -> Tree:
        return add(grads, ctx["correction"])

    def client_finish(
        self, params: Tree, ctx: Context, client: State | None, run: LocalRun
    ) -> tuple[Update, State | None]:
        delta = subtract(params, ctx["params"])
        control = {
            name: -ctx["correction"][name] - moved / run.lr_sum[name] if run.lr_sum[name] else ctx["own"][name]
            for name, moved in delta.items()
        }
        return Update(delta=delta, aux={"control": subtract(control, ctx["own"])}), {"control": control}

    def server_update(self, server: State, aggregate: Aggregate) -> State:
        server = super().server_update(server, aggregate)
        return {**server, "control": add(server["control"], aggregate.aux["control"], alpha=1 / aggregate.population)}
