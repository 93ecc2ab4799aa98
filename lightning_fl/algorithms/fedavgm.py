"""FedAvgM: server momentum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lightning_fl.algorithms.base import Algorithm, check_hyperparameter
from lightning_fl.algorithms.registry import register
from lightning_fl.tree import add, zeros_like
from lightning_fl.types import Aggregate, State, Tree


@register("fedavgm")
@dataclass(frozen=True)
class FedAvgM(Algorithm):
    r"""FedAvgM: the server moves along the clients' mean change with momentum.

    .. math::
        \Delta &= \mathrm{mean}_i (y_i - x) \\
        v &\leftarrow \beta v + \Delta \\
        x &\leftarrow x + \eta_s v \qquad \text{or, with Nesterov,} \qquad x \leftarrow x + \eta_s (\Delta + \beta v)

    As in the paper and in ``torch.optim.SGD``, momentum has no dampening: under a constant change :math:`\Delta` the
    velocity grows to :math:`\Delta / (1 - \beta)`, 10 times :math:`\Delta` at the default. Lower ``server_lr`` if
    training diverges.

    Args:
        server_lr: The server's learning rate :math:`\eta_s`. Default 1.
        momentum: The momentum :math:`\beta`. Default 0.9; 0 is FedAvg.
        nesterov: Whether to use Nesterov momentum. Default False.

    Raises:
        ValueError: If ``momentum`` is not in [0, 1).

    Reference:
        Hsu et al., "Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification",
        2019.
    """

    server_lr: float = 1.0
    momentum: float = 0.9
    nesterov: bool = False

    is_elementwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_hyperparameter(self, "momentum", 0 <= self.momentum < 1, "a number in [0, 1)")

    def server_init(self, params: Tree, population: int) -> State:
        return {"params": params, "velocity": zeros_like(params)}

    def server_update(self, server: State, aggregate: Aggregate) -> State:
        change = aggregate.mean()
        velocity = add(change, server["velocity"], alpha=self.momentum)
        step = add(change, velocity, alpha=self.momentum) if self.nesterov else velocity
        return {"params": add(server["params"], step, alpha=self.server_lr), "velocity": velocity}
