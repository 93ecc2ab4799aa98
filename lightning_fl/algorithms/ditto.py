"""Ditto: a global model, and a personal model per client that is regularised towards it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from lightning_fl.algorithms.base import Algorithm, check_hyperparameter
from lightning_fl.algorithms.fedprox import add_proximal
from lightning_fl.algorithms.registry import register
from lightning_fl.types import Context, Phase, Tree


@register("ditto")
@dataclass(frozen=True)
class Ditto(Algorithm):
    r"""Ditto: federated averaging, plus a personal model per client that is regularised towards the global one.

    .. math::
        x &\leftarrow x + \eta_s \, \mathrm{mean}_i (y_i - x) \\
        v_i &\leftarrow v_i - \eta \left( \nabla F_i(v_i) + \lambda (v_i - x) \right)
        \qquad \text{(} x \text{ from the start of the round)}

    First the client trains exactly as in FedAvg, then it trains its personal model :math:`v_i` for the same amount of
    work. Metrics logged in ``training_step`` are those of the FedAvg phase. A personal model starts as the global model
    of the client's first round; in the paper it starts as the initial global model, which is the same for clients that
    take part in the first round. It is part of the client's state: ``fl.load_client`` loads it, and
    :class:`~lightning_fl.callbacks.PersonalizedEvaluation` evaluates it.

    Args:
        lam: The strength :math:`\lambda` of the regularisation. Default 1; 0 is local training, and the paper tries
            0.05 to 2.
        own_epochs: Passes over the client's data to train its personal model. Default None: as much local work as for
            the global model.
        server_lr: The server's learning rate :math:`\eta_s`. Default 1.

    Raises:
        ValueError: If ``lam`` is negative or ``own_epochs`` is not positive; with ``personal`` tensors, because the
            whole personal model already holds them.

    Reference:
        Li et al., "Ditto: Fair and Robust Federated Learning Through Personalization", ICML 2021.
    """

    lam: float = 1.0
    own_epochs: int | None = None
    server_lr: float = 1.0

    def __post_init__(self) -> None:
        check_hyperparameter(self, "lam", self.lam >= 0, "a number that is not negative")
        check_hyperparameter(self, "own_epochs", self.own_epochs is None or self.own_epochs >= 1, "None or at least 1")

    def personal(self, module: nn.Module, named: Sequence[str]) -> Sequence[str]:
        if named:
            raise ValueError(
                f"Ditto keeps a whole model for each client, but found personal={list(named)} as well. Leave it "
                "out, or use FedPer."
            )
        return ()

    def phases(self) -> tuple[Phase, ...]:
        return Phase(), Phase(model="own", epochs=self.own_epochs, grad_transform=self._pull)

    def _pull(self, grads: Tree, params: Tree, ctx: Context) -> Tree:
        # `params` is the personal model, but the context still holds the global model of the round's start.
        return add_proximal(grads, params, ctx["params"], self.lam)
