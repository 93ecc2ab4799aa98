"""FedProx: a proximal term in the local loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lightning_fl.algorithms.base import Algorithm, check_hyperparameter
from lightning_fl.algorithms.registry import register
from lightning_fl.tree import tree_map
from lightning_fl.types import Context, Tree


def add_proximal(grads: Tree, params: Tree, start: Tree, mu: float) -> Tree:
    r"""Adds the gradient of the proximal term :math:`\frac{\mu}{2} \lVert y - x \rVert^2`.

    Args:
        grads: The gradients at ``params``.
        params: The current parameters :math:`y`.
        start: The parameters :math:`x` at the start of the round.
        mu: The strength :math:`\mu` of the term.
    """
    # The server's x may have a higher precision than the module's. Rounded to the module's dtype, the term starts at 0.
    return tree_map(lambda grad, y, x: grad + mu * (y - x.to(y.dtype)), grads, params, start)


@register("fedprox")
@dataclass(frozen=True)
class FedProx(Algorithm):
    r"""FedProx: federated averaging in which a proximal term keeps each client near the global model.

    .. math::
        g &\leftarrow g + \mu \, (y - x) \\
        x &\leftarrow x + \eta_s \, \mathrm{mean}_i (y_i - x)

    The term's gradient is added at each step before gradient clipping, so the loss that the module computes and logs is
    unchanged. The paper measures local work by an inexactness :math:`\gamma`; here the strategy's ``local_epochs`` or
    ``local_steps`` set it. The paper samples clients by size and averages uniformly; here clients are sampled uniformly
    and weighted by their examples, which has the same expectation.

    Args:
        mu: The strength :math:`\mu` of the proximal term. Default 0.01; 0 is FedAvg, and the paper tries 0.001 to 1.
        server_lr: The server's learning rate :math:`\eta_s`. Default 1.

    Raises:
        ValueError: If ``mu`` is negative.

    Reference:
        Li et al., "Federated Optimization in Heterogeneous Networks", MLSys 2020.
    """

    mu: float = 0.01
    server_lr: float = 1.0

    is_elementwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_hyperparameter(self, "mu", self.mu >= 0, "a number that is not negative")

    @property
    def adds_to_gradients(self) -> bool:  # type: ignore[override]
        """Without the proximal term it is plain averaging."""
        return self.mu > 0

    def grad_transform(self, grads: Tree, params: Tree, ctx: Context) -> Tree:
        return add_proximal(grads, params, ctx["params"], self.mu)
