"""FedProx: a proximal pull towards the global model."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_fl.algorithms.base import Algorithm, check_hyperparameter
from lightning_fl.algorithms.registry import register
from lightning_fl.tree import tree_map
from lightning_fl.types import Context, Tree


def add_proximal(grads: Tree, params: Tree, start: Tree, mu: float) -> Tree:
    r"""The gradients of the loss with :math:`\frac{\mu}{2} \lVert y - x \rVert^2` added to it.

    The start is taken as the module holds it, so that the pull is 0 there in 16 bits too.
    """
    return tree_map(lambda grad, y, x: grad + mu * (y - x.to(y.dtype)), grads, params, start)


@register("fedprox")
@dataclass(frozen=True)
class FedProx(Algorithm):
    r"""FedProx: federated averaging in which a proximal term holds each client near the global model.

    .. math::
        g &\leftarrow g + \mu \, (y - x) \\
        x &\leftarrow x + \eta_s \, \mathrm{mean}_i (y_i - x)

    The term's gradient is added to each step's gradient before clipping, so the module's loss, and what it logs of it,
    stay as they are. The paper measures local work by an inexactness :math:`\gamma`; here it is what the strategy's
    ``local_epochs`` or ``local_steps`` say. The paper draws clients by their size and averages evenly; here clients are
    drawn evenly and weigh by their examples, which has the same expectation.

    Args:
        mu: The strength :math:`\mu` of the pull. Default 0.01; 0 is FedAvg, and the paper tries 0.001 to 1.
        server_lr: The server's step :math:`\eta_s`. Default 1.

    Raises:
        ValueError: If ``mu`` is negative.

    Reference:
        Li et al., "Federated Optimization in Heterogeneous Networks", MLSys 2020.
    """

    mu: float = 0.01
    server_lr: float = 1.0

    def __post_init__(self) -> None:
        check_hyperparameter(self, "mu", self.mu >= 0, "a number that is not negative")

    def grad_transform(self, grads: Tree, params: Tree, ctx: Context) -> Tree:
        return add_proximal(grads, params, ctx["params"], self.mu)
