"""The words of the framework as data: what a client contributes and what a round makes of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import Tensor

ClientId: TypeAlias = int | str
Tree: TypeAlias = dict[str, Tensor]
"""Tensors keyed by their ``state_dict`` name."""
State: TypeAlias = Mapping[str, Any]
"""What an algorithm keeps between rounds: a mapping of trees and tensors only, so that it checkpoints and moves."""
Context: TypeAlias = Mapping[str, Any]
"""What an algorithm hands from ``client_init`` to the later steps of the same client and round."""


@dataclass(frozen=True)
class Update:
    """What one client contributes to a round.

    Args:
        delta: Change of the trainable shared parameters over local training, ``y_i - x``.
        buffers: Change of the shared persistent buffers. Always weighted-averaged; no algorithm sees them.
        weight: The client's share in the weighted mean, filled in by the strategy.
        aux: Side channels such as SCAFFOLD's ``c_i' - c_i``: summed as they are, never weighted.
    """

    delta: Tree
    buffers: Tree = field(default_factory=dict)
    weight: float = 1.0
    aux: Mapping[str, Tree] = field(default_factory=dict)


@dataclass(frozen=True)
class Aggregate:
    """The sum of a round's updates. Division happens once, in :meth:`mean`, after the server halves of the transforms.

    Args:
        delta: ``sum_i w_i (y_i - x)``.
        buffers: ``sum_i w_i (b_i - b)``.
        weight: ``sum_i w_i``; a differential-privacy transform sets it to the expected one.
        aux: Unweighted sums of the side channels.
        num_clients: Updates accepted in this round.
        population: Number of clients in the federation.
    """

    delta: Tree
    buffers: Tree
    weight: float
    aux: Mapping[str, Tree]
    num_clients: int
    population: int

    def mean(self) -> Tree:
        """The weighted mean of the clients' changes, ``delta / weight``; zero if no client has taken part."""
        return {name: total / (self.weight or 1.0) for name, total in self.delta.items()}


@dataclass(frozen=True)
class LocalRun:
    """Facts of one client's local training, measured by the engine.

    Args:
        num_steps: Optimizer steps really taken (a ``GradScaler`` can skip one).
        num_examples: Examples that one pass of the client's loader yields.
        weight: The client's weight in the mean.
        loss: Mean training loss over the examples processed; NaN if the module returned none.
        lr_sum: For each tensor, the learning rates of its optimizer steps summed.
        normalizer: FedNova's ``|a_i|_1``, or None if it is unknown for the optimizer.
    """

    num_steps: int
    num_examples: int
    weight: float
    loss: float
    lr_sum: Mapping[str, float]
    normalizer: float | None = None
