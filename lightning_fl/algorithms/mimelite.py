"""MimeLite: the server's optimizer statistics, applied in every local step."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch.optim import SGD, Optimizer

from lightning_fl.algorithms.base import Algorithm, ProbeKind, Weighting, check_hyperparameter
from lightning_fl.algorithms.registry import register
from lightning_fl.tree import real_map, scale, subtract, tree_map, zeros_like
from lightning_fl.types import Aggregate, Context, LocalRun, State, Tree, Update


@register("mimelite")
@dataclass(frozen=True)
class MimeLite(Algorithm):
    r"""MimeLite: clients step with the server's momentum (and Adam's scaling), fixed during local training.

    .. math::
        g &\leftarrow (1 - \beta_1) g + \beta_1 m \qquad \text{or, with } \beta_2, \qquad
        g \leftarrow \frac{(1 - \beta_1) g + \beta_1 m}{\sqrt{v} + \tau} \\
        x &\leftarrow x + \eta_s \, \mathrm{mean}_i (y_i - x) \\
        m &\leftarrow (1 - \beta_1) \bar g + \beta_1 m, \qquad v \leftarrow (1 - \beta_2) \bar g^2 + \beta_2 v, \qquad
        \bar g = \mathrm{mean}_i \nabla F_i(x)

    Each client measures :math:`\nabla F_i(x)` in an additional pass over its data at the global model. As in the paper,
    the moments start at 0 without bias correction, so in Adam's first round the steps are
    :math:`(1 - \beta_1) \eta g / \tau`. In the paper all clients have the same weight; with ``weighting="examples"``
    both means are weighted. The module's optimizer should be plain ``torch.optim.SGD``, whose learning rate is the
    paper's :math:`\eta`. FedJAX accepts any base optimizer, whose momentum may lack the factor :math:`1 - \beta_1`.

    Args:
        server_lr: The server's learning rate :math:`\eta_s`. Default 1, as in the paper.
        beta1: Momentum :math:`\beta_1`. Default 0.9; 0 without ``beta2`` is FedAvg.
        beta2: Decay :math:`\beta_2` of the squared gradient. Default None: SGD with momentum; the paper has 0.99 for
            Adam.
        tau: The constant :math:`\tau` that keeps Adam's divisor above 0. Default 0.001.

    Raises:
        ValueError: If a momentum is not in [0, 1), or ``tau`` is not positive.

    Reference:
        Karimireddy et al., "Mime: Mimicking Centralized Stochastic Algorithms in Federated Learning", 2020 (NeurIPS
        2021 as "Breaking the Centralized Barrier for Cross-Device Federated Learning").
    """

    server_lr: float = 1.0
    beta1: float = 0.9
    beta2: float | None = None
    tau: float = 1e-3

    weighting: ClassVar[Weighting] = "uniform"
    probe: ClassVar[ProbeKind | None] = "grad"
    client_keys: ClassVar[tuple[str, ...]] = ("params", "momentum", "square")

    def __post_init__(self) -> None:
        check_hyperparameter(self, "beta1", 0 <= self.beta1 < 1, "a number in [0, 1)")
        check_hyperparameter(self, "beta2", self.beta2 is None or 0 <= self.beta2 < 1, "None or a number in [0, 1)")
        check_hyperparameter(self, "tau", self.tau > 0, "a positive number")

    @property
    def adds_to_gradients(self) -> bool:  # type: ignore[override]
        """Without momentum, a gradient is at most scaled."""
        return self.beta1 > 0

    def check_optimizers(self, optimizers: Sequence[Optimizer]) -> None:
        plain = all(type(o) is SGD and all(group["momentum"] == 0 for group in o.param_groups) for o in optimizers)
        if not plain:
            names = ", ".join(type(optimizer).__name__ for optimizer in optimizers)
            warnings.warn(
                f"MimeLite applies the server's momentum and scaling, but found {names}: the local optimizer's own "
                "momentum or scaling comes on top and drifts towards the client's data. Use torch.optim.SGD without "
                "momentum.",
                stacklevel=2,
            )

    def server_init(self, params: Tree, population: int) -> State:
        state = {"params": params, "momentum": zeros_like(params)}
        return state if self.beta2 is None else {**state, "square": zeros_like(params)}

    def aux_like(self, params: Tree) -> Mapping[str, Tree]:
        return {"gradient": params}

    def client_init(self, server: State, client: State | None, probe: Any = None) -> Context:
        return {**server, "gradient": probe}

    def grad_transform(self, grads: Tree, params: Tree, ctx: Context) -> Tree:
        step = self._average(grads, ctx["momentum"], self.beta1)
        if self.beta2 is None:
            return step
        return real_map(lambda g, v: g / (v.sqrt() + self.tau), step, ctx["square"])

    def client_finish(
        self, params: Tree, ctx: Context, client: State | None, run: LocalRun
    ) -> tuple[Update, State | None]:
        gradient = scale(ctx["gradient"], run.weight)  # side channels are summed unweighted
        return Update(delta=subtract(params, ctx["params"]), aux={"gradient": gradient}), client

    def server_update(self, server: State, aggregate: Aggregate) -> State:
        gradient = scale(aggregate.aux["gradient"], 1 / aggregate.weight)
        state = {**super().server_update(server, aggregate)}
        state["momentum"] = self._average(gradient, server["momentum"], self.beta1)
        if self.beta2 is not None:
            state["square"] = self._average(real_map(lambda g: g.square(), gradient), server["square"], self.beta2)
        return state

    def _average(self, new: Tree, old: Tree, beta: float) -> Tree:
        return tree_map(lambda n, o: (1 - beta) * n + beta * o, new, old)
