"""What a federation is made of, and what it carries from round to round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from lightning_fl.aggregation import Aggregator, Transform
from lightning_fl.algorithms import Algorithm, Weighting
from lightning_fl.clients import Sampling
from lightning_fl.types import State


@dataclass(frozen=True)
class FederationSettings:
    """What does not change from round to round.

    Args:
        algorithm: The mathematics.
        aggregator: How updates become one.
        transforms: What happens to updates on their way.
        weighting: What a client weighs in the mean.
        seed: Seed of all randomness that privacy does not rest on.
        population: Number of clients in the federation.
        sampling: How the cohorts are drawn.
        silos: Whether each rank is a silo with its own data.
    """

    algorithm: Algorithm
    aggregator: Aggregator
    transforms: Sequence[Transform]
    weighting: Weighting
    seed: int
    population: int
    sampling: Sampling | None = None
    silos: bool = False

    @property
    def hides_clients(self) -> bool:
        """Whether a transform must not disclose who has taken part; a refused client then counts as zeros."""
        return any(transform.hides_clients for transform in self.transforms)

    @property
    def hides_silos(self) -> bool:
        """Whether silos must not tell each other anything about their data."""
        return self.silos and self.aggregator.hides_reports

    @property
    def transforms_gradients(self) -> bool:
        """Whether the algorithm changes gradients at all."""
        return type(self.algorithm).grad_transform is not Algorithm.grad_transform

    def weight_of(self, num_examples: int) -> float:
        """The weight of a client with so many examples."""
        return float(num_examples) if self.weighting == "examples" else 1.0


@dataclass(frozen=True)
class FederationState:
    """What changes from round to round, the same on every rank.

    Args:
        server: The algorithm's server state; empty before the first round.
        transforms: The state of each transform's server half.
    """

    server: State = field(default_factory=dict)
    transforms: Sequence[State] = ()
