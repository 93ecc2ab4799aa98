"""FedSAM: local steps that look for flat minima."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lightning_fl.algorithms.base import Algorithm, Weighting, check_hyperparameter
from lightning_fl.algorithms.registry import register
from lightning_fl.tree import squared_norm
from lightning_fl.types import Context, Tree


@register("fedsam")
@dataclass(frozen=True)
class FedSAM(Algorithm):
    r"""FedSAM: federated averaging in which clients step along the gradient at the worst point nearby.

    .. math::
        g = \nabla F_i \Big( y + \rho \, \frac{\nabla F_i(y)}{\lVert \nabla F_i(y) \rVert} \Big)

    The norm is taken over all shared parameters together. Where the gradient is zero, :math:`g` is zero as well.

    Args:
        rho: The radius :math:`\rho` of the perturbation, in units of the parameters. Default 0.05; 0 is FedAvg.
        server_lr: The server's learning rate :math:`\eta_s`. Default 1.

    Raises:
        ValueError: If ``rho`` is negative; when training starts, if a batch's gradient can't be computed twice, as for
            :class:`PerFedAvg`.

    Reference:
        Qu et al., "Generalized Federated Learning via Sharpness Aware Minimization", ICML 2022.
    """

    rho: float = 0.05
    server_lr: float = 1.0

    weighting: ClassVar[Weighting] = "uniform"
    needs_gradient_at: ClassVar[bool] = True
    adds_to_gradients: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_hyperparameter(self, "rho", self.rho >= 0, "a number that is not negative")

    def grad_transform(self, grads: Tree, params: Tree, ctx: Context) -> Tree:
        if not grads:
            return grads
        # The lower bound avoids 0 / 0 for a gradient of 0.
        factor = self.rho / squared_norm(grads).sqrt().clamp(min=1e-30)
        point = {name: params[name] + (factor * grad).to(params[name].dtype) for name, grad in grads.items()}
        found: Tree = ctx["gradient_at"](point)
        return found
