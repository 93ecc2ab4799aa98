"""Per-FedAvg: a global model that is good after one step on a client's own data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lightning_fl.algorithms.base import Algorithm, Weighting, check_hyperparameter
from lightning_fl.algorithms.registry import register
from lightning_fl.tree import add
from lightning_fl.types import Context, Tree


@register("perfedavg")
@dataclass(frozen=True)
class PerFedAvg(Algorithm):
    r"""Per-FedAvg: federated averaging of the loss after one gradient step, so that the model adapts to each client.

    .. math::
        \min_x \; \mathrm{mean}_i \, F_i(x - \alpha \nabla F_i(x)): \qquad
        g = (I - \alpha \nabla^2 F_i(y)) \, \nabla F_i(y - \alpha \nabla F_i(y))

    In each local step the module's optimizer uses :math:`g` at the client's current :math:`y`. The paper takes three
    independent batches for the two gradients and the Hessian; here all use the step's batch, so that a step needs no
    more data than one of FedAvg. The Hessian-vector product is exact, by differentiating the gradient; ``first_order``
    leaves it out, like the paper's FO variant. Other frameworks continue from the adapted point
    :math:`y - \alpha \nabla F_i(y)`, which minimises another objective. A client's personal model is the global one
    after a step with learning rate :math:`\alpha` on its data: ``PersonalizedEvaluation(finetune_epochs=1)`` evaluates
    such models.

    Args:
        alpha: The learning rate :math:`\alpha` of the adaptation step. Default 0.01; 0 is FedAvg, and the paper uses
            0.001 to 0.01.
        first_order: Whether to leave out the Hessian. Default False. True saves a third of the work.
        server_lr: The server's learning rate :math:`\eta_s`. Default 1.

    Raises:
        ValueError: If ``alpha`` is negative; when training starts, with manual optimization, accumulated gradients,
            ``precision="16-mixed"`` or sample-level privacy, where a batch's gradient can't be computed twice.

    Reference:
        Fallah et al., "Personalized Federated Learning with Theoretical Guarantees: A Model-Agnostic Meta-Learning
        Approach", NeurIPS 2020.
    """

    alpha: float = 0.01
    first_order: bool = False
    server_lr: float = 1.0

    weighting: ClassVar[Weighting] = "uniform"
    needs_gradient_at: ClassVar[bool] = True
    adds_to_gradients: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_hyperparameter(self, "alpha", self.alpha >= 0, "a number that is not negative")

    def grad_transform(self, grads: Tree, params: Tree, ctx: Context) -> Tree:
        gradient_at = ctx["gradient_at"]
        point = {name: params[name] - self.alpha * grad for name, grad in grads.items()}
        adapted: Tree = gradient_at(point)
        if self.first_order or not self.alpha:
            return adapted
        return add(adapted, gradient_at.hessian_product(params, adapted), alpha=-self.alpha)
