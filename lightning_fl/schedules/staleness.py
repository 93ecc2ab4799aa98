"""Weights for stale updates, and the transforms that apply them."""

# No `from __future__ import annotations`: jsonargparse would resolve the strings in the modules of the subclasses.
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from lightning_fl.aggregation import RoundContext, Transform
from lightning_fl.types import State, Tree, Update


class StalenessFunction(ABC):
    r"""The weight :math:`s(\tau)` of an update that started :math:`\tau` server updates ago; :math:`s(0) = 1`."""

    @abstractmethod
    def __call__(self, staleness: int) -> float:
        """The weight at a staleness."""


@dataclass(frozen=True)
class Polynomial(StalenessFunction):
    r""":math:`s(\tau) = (1 + \tau)^{-a}`; FedBuff's is ``Polynomial(0.5)``.

    Args:
        a: The exponent, at least 0. Default 0.5.

    Raises:
        ValueError: If it is negative.
    """

    a: float = 0.5

    def __post_init__(self) -> None:
        if not self.a >= 0:
            raise ValueError(f"Polynomial got a={self.a}; expected at least 0.")

    def __call__(self, staleness: int) -> float:
        """See :class:`StalenessFunction`."""
        return float((1 + staleness) ** -self.a)


@dataclass(frozen=True)
class Hinge(StalenessFunction):
    r""":math:`s(\tau) = 1` up to ``b``, and :math:`1 / (1 + a (\tau - b))` beyond; FedAsync's second choice.

    Args:
        a: The rate :math:`a` of the decrease, at least 0. Default 10.
        b: The largest staleness :math:`b` of full weight, at least 0. Default 4.

    Raises:
        ValueError: If one is negative.
    """

    a: float = 10.0
    b: float = 4.0

    def __post_init__(self) -> None:
        if not (self.a >= 0 and self.b >= 0):
            raise ValueError(f"{self!r} needs a and b of at least 0.")

    def __call__(self, staleness: int) -> float:
        """See :class:`StalenessFunction`."""
        return 1 / (1 + self.a * max(0.0, staleness - self.b))


class Stale(Transform):
    r"""Multiplies a client's change by :math:`s(\tau)`; the client's weight stays unchanged, as in FedBuff.

    Args:
        staleness: The weight by staleness. None: 1.
        by_share: Whether to also multiply by the share of all clients that are in the round.
    """

    keeps_norm_bound = True
    is_lossy = True

    def __init__(self, staleness: StalenessFunction | None, by_share: bool = False) -> None:
        self.staleness = staleness
        self.by_share = by_share

    def client(self, update: Update, state: State, ctx: RoundContext) -> tuple[Update, State]:
        """See :meth:`Transform.client`."""
        scale = _weight(self.staleness, ctx)
        return _scaled(update, scale * len(ctx.cohort) / ctx.population if self.by_share else scale), state


class Mixed(Transform):
    r"""Replaces a client's change by the difference to the current model: :math:`\alpha s(\tau) (y_i - x)`.

    Args:
        alpha: The share of a fresh model.
        staleness: The weight by staleness. None: 1.
    """

    needs_start = True
    is_lossy = True

    def __init__(self, alpha: float, staleness: StalenessFunction | None = None) -> None:
        self.alpha = alpha
        self.staleness = staleness

    def client(self, update: Update, state: State, ctx: RoundContext) -> tuple[Update, State]:
        """See :meth:`Transform.client`."""
        scale = self.alpha * _weight(self.staleness, ctx)
        if ctx.staleness and ctx.start is not None and ctx.template is not None:
            start, present = ctx.start, ctx.template
            update = Update(
                _plus_way(update.delta, start.delta, present.delta),
                _plus_way(update.buffers, start.buffers, present.buffers),
                update.weight,
                update.aux,
            )
        return _scaled(update, scale), state


def _weight(staleness: StalenessFunction | None, ctx: RoundContext) -> float:
    return 1.0 if staleness is None else staleness(ctx.staleness)


def _plus_way(change: Tree, start: Tree, present: Tree) -> Tree:
    """``change + (start - present)`` for floating-point tensors; other changes already refer to ``present``."""
    moved = {}
    for name, own in change.items():
        way = start[name] - present[name] if name in start else torch.zeros_like(own)
        moved[name] = own + torch.where(way.isfinite(), way, 0).to(own.dtype)
    return moved


def _scaled(update: Update, factor: float) -> Update:
    if factor == 1:
        return update
    delta = {name: tensor * factor for name, tensor in update.delta.items()}
    buffers = {name: tensor * factor for name, tensor in update.buffers.items()}
    return Update(delta, buffers, update.weight, update.aux)
