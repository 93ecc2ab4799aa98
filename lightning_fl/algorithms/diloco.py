"""DiLoCo: many local steps between outer steps with Nesterov momentum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from lightning_fl.algorithms.base import Weighting
from lightning_fl.algorithms.fedavgm import FedAvgM
from lightning_fl.algorithms.registry import register


@register("diloco")
@dataclass(frozen=True)
class DiLoCo(FedAvgM):
    r"""DiLoCo: replicas train for hundreds of steps on their own; a Nesterov outer optimizer applies their mean change.

    .. math::
        \Delta &= \mathrm{mean}_i (y_i - x) \\
        v &\leftarrow \beta v + \Delta, \qquad x \leftarrow x + \eta_s (\Delta + \beta v)

    This is :class:`FedAvgM` with the paper's outer optimizer and equal weights for all replicas. The inner optimizer is
    set in the strategy and the module: ``local_steps=500``, ``client_optimizer="keep"`` and ``torch.optim.AdamW``.

    Args:
        server_lr: The outer learning rate :math:`\eta_s`. Default 0.7.
        momentum: The outer momentum :math:`\beta`. Default 0.9.
        nesterov: Whether the outer momentum is Nesterov's. Default True.

    Raises:
        ValueError: If ``momentum`` is not in [0, 1).

    Reference:
        Douillard et al., "DiLoCo: Distributed Low-Communication Training of Language Models", 2023.

    Example:
        >>> import lightning_fl as fl
        >>> strategy = fl.FederatedStrategy("diloco", num_clients=8, local_steps=500, client_optimizer="keep")
    """

    server_lr: float = 0.7
    momentum: float = 0.9
    nesterov: bool = True

    weighting: ClassVar[Weighting] = "uniform"
