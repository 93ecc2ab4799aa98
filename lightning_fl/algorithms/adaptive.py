"""FedAdagrad, FedAdam and FedYogi: adaptive server optimizers."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_fl.algorithms.base import Algorithm, check_hyperparameter
from lightning_fl.algorithms.registry import register
from lightning_fl.tree import real_map, tree_map
from lightning_fl.types import Aggregate, State, Tree


@dataclass(frozen=True)
class AdaptiveServer(Algorithm):
    r"""Base of the adaptive server optimizers: momentum, and a step divided by the root of a second moment.

    .. math::
        \Delta &= \mathrm{mean}_i (y_i - x) \\
        m &\leftarrow \beta_1 m + (1 - \beta_1) \Delta \\
        x &\leftarrow x + \eta_s \frac{m}{\sqrt{v} + \tau}

    As in the paper, :math:`v` starts at :math:`\tau^2` and there is no bias correction. Subclasses define the update of
    the second moment :math:`v`. A complex parameter is treated as pairs of real numbers.

    Args:
        server_lr: The server's learning rate :math:`\eta_s`. Default 0.1.
        beta1: Momentum :math:`\beta_1` of the mean change. Default 0.9.
        beta2: Decay rate of the second moment. Default 0.99.
        tau: The degree of adaptivity :math:`\tau`. Default 0.001.

    Raises:
        ValueError: If ``beta1`` or ``beta2`` is not in [0, 1), or ``tau`` is not positive.
    """

    server_lr: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3

    is_elementwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_hyperparameter(self, "beta1", 0 <= self.beta1 < 1, "a number in [0, 1)")
        check_hyperparameter(self, "beta2", 0 <= self.beta2 < 1, "a number in [0, 1)")
        check_hyperparameter(self, "tau", self.tau > 0, "a positive number")

    @abstractmethod
    def second_moment(self, moment: Tensor, change: Tensor) -> Tensor:
        """The updated second moment of a tensor, from the current one and the mean change."""

    def server_init(self, params: Tree, population: int) -> State:
        first = tree_map(torch.zeros_like, params)
        second = real_map(lambda param: torch.full_like(param, self.tau**2), params)
        return {"params": params, "first_moment": first, "second_moment": second}

    def server_update(self, server: State, aggregate: Aggregate) -> State:
        change = aggregate.mean()
        first = tree_map(lambda m, delta: self.beta1 * m + (1 - self.beta1) * delta, server["first_moment"], change)
        second = real_map(self.second_moment, server["second_moment"], change)
        params = real_map(
            lambda x, m, v: x + self.server_lr * m / (v.sqrt() + self.tau), server["params"], first, second
        )
        return {"params": params, "first_moment": first, "second_moment": second}


@register("fedadagrad")
@dataclass(frozen=True)
class FedAdagrad(AdaptiveServer):
    r"""FedAdagrad: the server divides its step by the root of the sum of all squared mean changes so far.

    .. math:: v \leftarrow v + \Delta^2, \qquad x \leftarrow x + \eta_s \frac{m}{\sqrt{v} + \tau}

    The mean change :math:`\Delta`, its momentum :math:`m` and the initial :math:`v = \tau^2` are as in
    :class:`FedAdam`.

    Args:
        server_lr: The server's learning rate :math:`\eta_s`. Default 0.1.
        beta1: Momentum of the mean change. Default 0.9; the paper's experiments use 0 for FedAdagrad.
        beta2: Not used; accepted so that one configuration fits all adaptive server optimizers.
        tau: The degree of adaptivity :math:`\tau`; larger is closer to plain momentum. Default 0.001.

    Raises:
        ValueError: If ``beta1`` or ``beta2`` is not in [0, 1), or ``tau`` is not positive.

    Reference:
        Reddi et al., "Adaptive Federated Optimization", ICLR 2021.
    """

    def second_moment(self, moment: Tensor, change: Tensor) -> Tensor:
        return moment + change.square()


@register("fedadam")
@dataclass(frozen=True)
class FedAdam(AdaptiveServer):
    r"""FedAdam: the server divides its step by the root of a moving average of the squared changes.

    .. math::
        \Delta &= \mathrm{mean}_i (y_i - x) \\
        m &\leftarrow \beta_1 m + (1 - \beta_1) \Delta, \qquad v \leftarrow \beta_2 v + (1 - \beta_2) \Delta^2 \\
        x &\leftarrow x + \eta_s \frac{m}{\sqrt{v} + \tau}

    As in the paper, :math:`v` starts at :math:`\tau^2` and there is no bias correction. Flower starts :math:`v` at 0.
    ``torch.optim.Adam`` corrects the bias of both moments; ``FedOpt(torch.optim.Adam)`` runs it.

    Args:
        server_lr: The server's learning rate :math:`\eta_s`. Default 0.1.
        beta1: Momentum of the mean change. Default 0.9.
        beta2: Decay rate :math:`\beta_2` of the second moment. Default 0.99.
        tau: The degree of adaptivity :math:`\tau`; larger is closer to plain momentum. Default 0.001.

    Raises:
        ValueError: If ``beta1`` or ``beta2`` is not in [0, 1), or ``tau`` is not positive.

    Reference:
        Reddi et al., "Adaptive Federated Optimization", ICLR 2021.
    """

    def second_moment(self, moment: Tensor, change: Tensor) -> Tensor:
        return self.beta2 * moment + (1 - self.beta2) * change.square()


@register("fedyogi")
@dataclass(frozen=True)
class FedYogi(AdaptiveServer):
    r"""FedYogi: like FedAdam, but the size of the second moment's change does not depend on the second moment.

    .. math::
        v \leftarrow v - (1 - \beta_2) \, \Delta^2 \, \mathrm{sign}(v - \Delta^2), \qquad
        x \leftarrow x + \eta_s \frac{m}{\sqrt{v} + \tau}

    The mean change :math:`\Delta`, its momentum :math:`m` and the initial :math:`v = \tau^2` are as in
    :class:`FedAdam`.

    Args:
        server_lr: The server's learning rate :math:`\eta_s`. Default 0.1.
        beta1: Momentum of the mean change. Default 0.9.
        beta2: Decay rate :math:`\beta_2`; the closer to 1, the slower the second moment changes. Default 0.99.
        tau: The degree of adaptivity :math:`\tau`; larger is closer to plain momentum. Default 0.001.

    Raises:
        ValueError: If ``beta1`` or ``beta2`` is not in [0, 1), or ``tau`` is not positive.

    Reference:
        Reddi et al., "Adaptive Federated Optimization", ICLR 2021.
    """

    def second_moment(self, moment: Tensor, change: Tensor) -> Tensor:
        square = change.square()
        return moment - (1 - self.beta2) * square * torch.sign(moment - square)
