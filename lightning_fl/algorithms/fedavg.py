"""Federated averaging."""

from dataclasses import dataclass
from typing import ClassVar

from lightning_fl.algorithms.base import Algorithm
from lightning_fl.algorithms.registry import register


@register("fedavg")
@dataclass(frozen=True)
class FedAvg(Algorithm):
    r"""Federated averaging: each client trains locally, and the server averages the changes of their models.

    .. math:: x \leftarrow x + \eta_s \, \frac{\sum_i n_i (y_i - x)}{\sum_i n_i}

    Args:
        server_lr: The server's learning rate :math:`\eta_s`. Default 1, which is plain averaging.

    Reference:
        McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS 2017.
    """

    server_lr: float = 1.0

    is_elementwise: ClassVar[bool] = True
