"""FedNova: averaging of normalised changes, for clients that do different amounts of work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch.optim import SGD, Optimizer

from lightning_fl.algorithms.base import Algorithm, AuxRole, check_hyperparameter
from lightning_fl.algorithms.fedprox import add_proximal
from lightning_fl.algorithms.registry import register
from lightning_fl.tree import add, scalar_like, scale, subtract
from lightning_fl.types import Aggregate, Context, LocalRun, State, Tree, Update


@register("fednova")
@dataclass(frozen=True)
class FedNova(Algorithm):
    r"""FedNova: each client's change is divided by its local work, so that extra local steps don't bias the optimum.

    .. math::
        x \leftarrow x + \eta_s \, \tau \, \sum_i p_i \frac{y_i - x}{a_i}, \qquad \tau = \sum_i p_i a_i

    with :math:`p_i` the clients' normalised weights. The work :math:`a_i` (the paper's :math:`\lVert a_i \rVert_1`) is
    the distance that local training would move under a constant gradient of 1, divided by the learning rate:

    - plain SGD: the number of steps :math:`\tau_i`;
    - with momentum :math:`\rho`: :math:`(\tau_i - \rho (1 - \rho^{\tau_i}) / (1 - \rho)) / (1 - \rho)`;
    - with the proximal term: :math:`(1 - (1 - \eta \mu)^{\tau_i}) / (\eta \mu)`.

    It is measured at each step of ``torch.optim.SGD``, so Nesterov momentum, dampening and learning-rate schedules are
    taken into account; the unit is then the first learning rate of the client's round. Weight decay counts as part of
    the loss. Other optimizers are refused, and so is momentum kept between rounds, which contains work of earlier
    rounds. The authors' code also has server momentum, which is left out here.

    Args:
        server_lr: The server's learning rate :math:`\eta_s`. Default 1.
        mu: Strength :math:`\mu` of FedProx's proximal term. Default 0; above 0 it requires plain SGD with one constant
            learning rate.

    Raises:
        ValueError: If ``mu`` is negative; when training starts, if the optimizer is not ``torch.optim.SGD``; in
            training, if the local work can't be measured.

    Reference:
        Wang et al., "Tackling the Objective Inconsistency Problem in Heterogeneous Federated Optimization",
        NeurIPS 2020.
    """

    server_lr: float = 1.0
    mu: float = 0.0

    aux_role: ClassVar[AuxRole] = "factor"

    def __post_init__(self) -> None:
        check_hyperparameter(self, "mu", self.mu >= 0, "a number that is not negative")

    @property
    def adds_to_gradients(self) -> bool:  # type: ignore[override]
        """Without the proximal term, gradients are left unchanged."""
        return self.mu > 0

    def check_optimizers(self, optimizers: Sequence[Optimizer]) -> None:
        names = [type(optimizer).__name__ for optimizer in optimizers if type(optimizer) is not SGD]
        if names:
            raise ValueError(
                f"FedNova divides by the amount of local work, which is unknown for {', '.join(names)}. Use "
                "torch.optim.SGD, with or without momentum, or another algorithm."
            )

    def aux_like(self, params: Tree) -> Mapping[str, Tree]:
        return {"work": {"sum": scalar_like(params)}}

    def grad_transform(self, grads: Tree, params: Tree, ctx: Context) -> Tree:
        return add_proximal(grads, params, ctx["params"], self.mu) if self.mu else grads

    def client_finish(
        self, params: Tree, ctx: Context, client: State | None, run: LocalRun
    ) -> tuple[Update, State | None]:
        delta, work = subtract(params, ctx["params"]), self._work(run)
        normalised = scale(delta, 1 / work) if work else delta
        return Update(delta=normalised, aux={"work": {"sum": scalar_like(params, run.weight * work)}}), client

    def server_update(self, server: State, aggregate: Aggregate) -> State:
        work = float(aggregate.aux["work"]["sum"]) / aggregate.weight
        step = self.server_lr * work / aggregate.weight
        return {**server, "params": add(server["params"], aggregate.delta, alpha=step)}

    def _work(self, run: LocalRun) -> float:
        if run.normalizer is None:
            raise ValueError(
                "FedNova can't measure the amount of local work. It needs a torch.optim.SGD that is reset every round "
                "and whose parameter groups share momentum and schedule: use one group, and client_optimizer='reset' "
                "with momentum."
            )
        if not self.mu or not run.normalizer:
            return run.normalizer
        lrs = {total / run.num_steps for total in run.lr_sum.values() if total}
        lr = max(lrs)
        if min(lrs) < (1 - 1e-9) * lr:
            raise ValueError(
                f"FedNova(mu={self.mu}) found tensors with learning rates from {min(lrs):g} to {lr:g}, which do "
                "different amounts of work under the proximal term. Use one learning rate, or mu=0."
            )
        # Only plain SGD with a constant learning rate has a normalizer of exactly the number of steps.
        if run.normalizer != run.num_steps:
            raise ValueError(
                f"FedNova(mu={self.mu}) found work of {run.normalizer:g} in {run.num_steps} steps; the proximal "
                "term is derived for plain SGD with one constant learning rate. Use that, or mu=0."
            )
        return (1 - (1 - lr * self.mu) ** run.num_steps) / (lr * self.mu)
