"""pFedMe: the global model follows personal models that a Moreau envelope keeps near it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lightning_fl.algorithms.base import Algorithm, Weighting, check_hyperparameter
from lightning_fl.algorithms.fedprox import add_proximal
from lightning_fl.algorithms.registry import register
from lightning_fl.tree import add, tree_map
from lightning_fl.types import Context, Tree


@register("pfedme")
@dataclass(frozen=True)
class PFedMe(Algorithm):
    r"""pFedMe: federated averaging on the Moreau envelopes of the clients' losses.

    .. math::
        \min_x \; \mathrm{mean}_i \min_\theta \Big( F_i(\theta) + \tfrac{\lambda}{2} \lVert \theta - x \rVert^2 \Big):
        \qquad g = \lambda \, (y - \theta(y))

    In each local step the personal model :math:`\theta(y)` is found by ``inner_steps`` gradient steps with learning
    rate ``inner_lr`` from :math:`y` on the step's batch; the module's optimizer then uses :math:`g` as the gradient.
    :math:`\theta` is not kept between rounds: a client's personal model is the global one fine-tuned on its own data,
    which ``PersonalizedEvaluation(finetune_epochs=1)`` evaluates.

    Args:
        lam: The strength :math:`\lambda` of the pull towards the global model. Default 15, as in the paper; the larger,
            the closer to FedAvg.
        inner_steps: Gradient steps that find :math:`\theta`. Default 5, as in the paper's experiments; each but the
            first costs a forward and a backward pass.
        inner_lr: Their learning rate; must be below ``2 / (lam + L)`` for a loss with ``L``-Lipschitz gradients.
            Default 0.03.
        server_lr: The server's learning rate, the paper's :math:`\beta`. Default 1.

    Raises:
        ValueError: If ``lam``, ``inner_steps`` or ``inner_lr`` is not positive; when training starts, if a batch's
            gradient can't be computed twice, as for :class:`PerFedAvg`.

    Reference:
        Dinh et al., "Personalized Federated Learning with Moreau Envelopes", NeurIPS 2020.
    """

    lam: float = 15.0
    inner_steps: int = 5
    inner_lr: float = 0.03
    server_lr: float = 1.0

    weighting: ClassVar[Weighting] = "uniform"
    needs_gradient_at: ClassVar[bool] = True
    adds_to_gradients: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_hyperparameter(self, "lam", self.lam > 0, "a positive number")
        check_hyperparameter(self, "inner_steps", self.inner_steps >= 1, "at least 1")
        check_hyperparameter(self, "inner_lr", self.inner_lr > 0, "a positive number")

    def grad_transform(self, grads: Tree, params: Tree, ctx: Context) -> Tree:
        start = {name: params[name] for name in grads}
        theta = add(start, grads, alpha=-self.inner_lr)  # the proximal term is 0 at the start
        for _ in range(self.inner_steps - 1):
            pulled = add_proximal(ctx["gradient_at"](theta), theta, start, self.lam)
            theta = add(theta, pulled, alpha=-self.inner_lr)
        return tree_map(lambda y, own: self.lam * (y - own), start, theta)
