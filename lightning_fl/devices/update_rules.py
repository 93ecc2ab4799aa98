"""The update rules of optimizers as pure functions, which can be exported."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_fl.types import Tree


class UpdateRule(ABC):
    """An optimizer's update rule. Its state starts at zero."""

    @abstractmethod
    def state(self, params: Tree) -> Tree:
        """The initial state: tensors of zeros by name."""

    @abstractmethod
    def step(self, params: Tree, grads: Tree, state: Tree, lr: Tensor) -> tuple[Tree, Tree]:
        """The updated parameters and state."""


@dataclass(frozen=True)
class SGD(UpdateRule):
    """Like ``torch.optim.SGD`` without dampening.

    Args:
        momentum: The momentum. Default 0: there is no state.
        nesterov: Whether to use Nesterov momentum.
        weight_decay: Multiple of the parameters that is added to the gradients.
    """

    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0

    def state(self, params: Tree) -> Tree:
        """See :meth:`UpdateRule.state`."""
        return {f"momentum.{name}": torch.zeros_like(own) for name, own in params.items()} if self.momentum else {}

    def step(self, params: Tree, grads: Tree, state: Tree, lr: Tensor) -> tuple[Tree, Tree]:
        """See :meth:`UpdateRule.step`."""
        moved, kept = {}, {}
        for name, param in params.items():
            grad = grads[name] + self.weight_decay * param if self.weight_decay else grads[name]
            if self.momentum:
                velocity = kept[f"momentum.{name}"] = self.momentum * state[f"momentum.{name}"] + grad
                grad = grad + self.momentum * velocity if self.nesterov else velocity
            moved[name] = param - lr * grad
        return moved, kept


@dataclass(frozen=True)
class Adam(UpdateRule):
    """Like ``torch.optim.Adam`` and ``AdamW`` without AMSGrad.

    Args:
        betas: Decay rates of the moving averages of the gradients and their squares.
        eps: Added to the denominator.
        weight_decay: Multiple of the parameters that is added to the gradients, or subtracted from the parameters.
        decoupled: Whether it is subtracted from the parameters, as in AdamW.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled: bool = False

    def state(self, params: Tree) -> Tree:
        """See :meth:`UpdateRule.state`."""
        means = {f"mean.{name}": torch.zeros_like(own) for name, own in params.items()}
        squares = {f"square.{name}": torch.zeros_like(own) for name, own in params.items()}
        return {**means, **squares, "steps": torch.zeros(())}

    def step(self, params: Tree, grads: Tree, state: Tree, lr: Tensor) -> tuple[Tree, Tree]:
        """See :meth:`UpdateRule.step`."""
        (beta1, beta2), steps = self.betas, state["steps"] + 1
        size, spread = lr / (1 - beta1**steps), 1 - beta2**steps
        moved, kept = {}, {"steps": steps}
        for name, param in params.items():
            grad = grads[name]
            if self.weight_decay and self.decoupled:
                param = param - lr * self.weight_decay * param
            elif self.weight_decay:
                grad = grad + self.weight_decay * param
            mean = kept[f"mean.{name}"] = beta1 * state[f"mean.{name}"] + (1 - beta1) * grad
            square = kept[f"square.{name}"] = beta2 * state[f"square.{name}"] + (1 - beta2) * grad * grad
            moved[name] = param - size * mean / ((square / spread).sqrt() + self.eps)
        return moved, kept


def rule_of(optimizer: torch.optim.Optimizer) -> UpdateRule:
    """The rule of an optimizer.

    Raises:
        ValueError: If it is not SGD, Adam or AdamW, or has settings that the rules don't support.
    """
    if len(optimizer.param_groups) != 1:
        raise ValueError(
            f"The optimizer has {len(optimizer.param_groups)} parameter groups; expected one, since a step has one "
            "learning rate."
        )
    group: dict[str, Any] = optimizer.param_groups[0]
    lacking = [name for name in ("dampening", "maximize", "amsgrad") if group.get(name)]
    if lacking or type(optimizer) not in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW):
        found = f"{type(optimizer).__name__} with {', '.join(lacking)}" if lacking else type(optimizer).__name__
        raise ValueError(f"A training step does not support {found}; expected SGD, Adam or AdamW.")
    decay = group["weight_decay"]
    if isinstance(optimizer, torch.optim.SGD):
        return SGD(group["momentum"], group["nesterov"], decay)
    decoupled = isinstance(optimizer, torch.optim.AdamW) or bool(group.get("decoupled_weight_decay"))
    return Adam(tuple(group["betas"]), group["eps"], decay, decoupled)
