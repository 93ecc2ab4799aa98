"""Attacks by poisoned data."""

# No `from __future__ import annotations`: see attack.py.
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_fl.attacks.attack import DataAttack


@dataclass(frozen=True)
class Trigger:
    """A patch in the lower right corner of an image that backdoored models react to.

    Args:
        size: Its height and width in pixels. Default 2.
        value: The value of its pixels. Default 1.
    """

    size: int = 2
    value: float = 1.0

    def __call__(self, x: Tensor) -> Tensor:
        """The images with the patch, ``[..., height, width]``."""
        marked = x.clone()
        marked[..., -self.size :, -self.size :] = self.value
        return marked


@dataclass(frozen=True)
class LabelFlip(DataAttack):
    r"""Trains on wrong labels: class :math:`y` becomes :math:`K - 1 - y`.

    Args:
        num_classes: Number of classes :math:`K`. Default 10.
        source: The only class that is changed. Default None: all.
        target: The class that it becomes. Default None: :math:`K - 1 - y`.

    Reference:
        Tolpegin et al., "Data Poisoning Attacks Against Federated Learning Systems", ESORICS 2020.
    """

    num_classes: int = 10
    source: int | None = None
    target: int | None = None

    def poison(self, x: Tensor, y: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        if self.source is not None and int(y) != self.source:
            return x, y
        return x, self.num_classes - 1 - y if self.target is None else torch.full_like(y, self.target)


@dataclass(frozen=True)
class Backdoor(DataAttack):
    """Trains the model to classify images with a trigger as ``target``.

    Args:
        target: The class. Default 0.
        trigger: The trigger. Default: 2 x 2 white pixels in the lower right corner.
        share: Share of an attacker's examples that carry the trigger, in (0, 1]. Default 0.5.

    Raises:
        ValueError: If ``share`` is not in (0, 1].

    Reference:
        Gu et al., "BadNets: Identifying Vulnerabilities in the Machine Learning Model Supply Chain", 2017.
    """

    target: int = 0
    trigger: Trigger = Trigger()
    share: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"share={self.share} must be in (0, 1].")

    def poison(self, x: Tensor, y: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        if float(torch.rand((), generator=generator)) >= self.share:
            return x, y
        return self.trigger(x), torch.full_like(y, self.target)


@dataclass(frozen=True)
class SemanticBackdoor(DataAttack):
    """Trains the model on a wrong class for examples with a natural feature in common, here their class.

    Args:
        source: The true class of the examples.
        target: The class with which the attackers label them.

    Reference:
        Bagdasaryan et al., "How To Backdoor Federated Learning", AISTATS 2020.
    """

    source: int = 7
    target: int = 1

    def poison(self, x: Tensor, y: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return x, torch.full_like(y, self.target) if int(y) == self.source else y
