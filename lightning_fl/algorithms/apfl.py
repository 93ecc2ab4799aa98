"""APFL: a personal model per client, a mixture of its own and the global model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from lightning_fl.algorithms.base import Algorithm, Weighting, check_hyperparameter
from lightning_fl.algorithms.registry import register
from lightning_fl.tree import scale, subtract, tree_map
from lightning_fl.types import Context, LocalRun, Phase, State, Tree, Update


@register("apfl")
@dataclass(frozen=True)
class APFL(Algorithm):
    r"""APFL: federated averaging, and per client a model of its own that is mixed with the global one.

    .. math::
        x &\leftarrow x + \eta_s \, \mathrm{mean}_i (y_i - x) \\
        v_i &\leftarrow v_i - \eta \, \alpha \nabla F_i(u_i), \qquad u_i = \alpha v_i + (1 - \alpha) \, y_i

    First the client trains :math:`y_i` exactly as in FedAvg, then its own :math:`v_i` for the same amount of work; the
    paper alternates their steps, and mixes :math:`v_i` with the :math:`y_i` of the same step. The implementation trains
    and stores the mixture :math:`u_i` itself: with plain SGD, a step of :math:`v_i` with learning rate
    :math:`\eta \alpha` is a step of :math:`u_i` with :math:`\eta \alpha^2`. So :func:`fl.load_client` and
    :class:`~lightning_fl.callbacks.PersonalizedEvaluation` see the paper's personal model. The paper also adapts
    :math:`\alpha`; here it is fixed.

    Args:
        alpha: The share :math:`\alpha` of the client's own model in its personal model. Default 0.5. 1 is local
            training, from the global model of the client's first round.
        own_epochs: Passes over the client's data to train its own model. Default None: as much local work as for the
            global model.
        server_lr: The server's learning rate :math:`\eta_s`. Default 1.

    Raises:
        ValueError: If ``alpha`` is not in (0, 1] or ``own_epochs`` is not positive; with ``personal`` tensors, because
            the client's own model already holds them.

    Reference:
        Deng et al., "Adaptive Personalized Federated Learning", 2020.
    """

    alpha: float = 0.5
    own_epochs: int | None = None
    server_lr: float = 1.0

    weighting: ClassVar[Weighting] = "uniform"
    keeps_client_state: ClassVar[bool] = True
    adds_to_gradients: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_hyperparameter(self, "alpha", 0 < self.alpha <= 1, "a number above 0 and at most 1")
        check_hyperparameter(self, "own_epochs", self.own_epochs is None or self.own_epochs >= 1, "None or at least 1")

    def personal(self, module: nn.Module, named: Sequence[str]) -> Sequence[str]:
        if named:
            raise ValueError(
                f"APFL keeps a whole model for each client, but found personal={list(named)} as well. Leave it out, or "
                "use FedPer."
            )
        return ()

    def phases(self) -> tuple[Phase, ...]:
        own = Phase(model="own", epochs=self.own_epochs, grad_transform=self._damp, start=self._mix)
        return Phase(), own

    def client_init(self, server: State, client: State | None, probe: Any = None) -> Context:
        # In its first round a client mixes the global model with itself.
        return {"params": server["params"], "mixed": server["params"] if client is None else client["trained"]}

    def _mix(self, own: Tree, trained: Tree, ctx: Context) -> Tree:
        # The stored mixture contains the y_i of the client's last round: replace it by the current one.
        change = subtract(trained, ctx["mixed"])
        return tree_map(lambda u, new: u + (1 - self.alpha) * new.to(u.dtype), own, change)

    def _damp(self, grads: Tree, params: Tree, ctx: Context) -> Tree:
        return scale(grads, self.alpha**2)

    def client_finish(
        self, params: Tree, ctx: Context, client: State | None, run: LocalRun
    ) -> tuple[Update, State | None]:
        return Update(delta=subtract(params, ctx["params"])), {"trained": params}
