"""The settings of a federation, and its state between rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lightning_fl.aggregation import Aggregator, Transform
from lightning_fl.algorithms import Algorithm, Weighting
from lightning_fl.clients import Durations, Sampling
from lightning_fl.schedules import Clock, RoundSchedule
from lightning_fl.types import ClientId, State, Tree


@dataclass(frozen=True)
class FederationSettings:
    """The settings of a federation, the same in every round.

    Args:
        algorithm: The federated algorithm.
        aggregator: Combines the updates of a round.
        transforms: Change each update between client and server, in order.
        weighting: How clients are weighted in the mean.
        seed: Seed of all random numbers except those on which privacy depends.
        population: Number of clients in the federation.
        sampling: How the cohorts are drawn.
        silos: Whether each rank is a silo with its own data.
        protects_examples: Whether local training hides each example of a client, by differential privacy.
        schedule: When rounds close on a simulated clock. None: there is no clock.
        durations: How long clients take on the simulated clock.
        clients: All clients in order; only for algorithms that ``know_index``.
    """

    algorithm: Algorithm
    aggregator: Aggregator
    transforms: Sequence[Transform]
    weighting: Weighting
    seed: int
    population: int
    sampling: Sampling | None = None
    silos: bool = False
    protects_examples: bool = False
    schedule: RoundSchedule | None = None
    durations: Durations | None = None
    clients: Sequence[ClientId] = ()

    @property
    def hides_clients(self) -> bool:
        """Whether a transform hides which clients took part; a refused client then counts as zeros."""
        return any(transform.hides_clients for transform in self.transforms)

    @property
    def hides_silos(self) -> bool:
        """Whether silos must not reveal anything about their data to each other."""
        # In a simulation one party holds all data, so nothing needs to be hidden.
        return self.silos and self.aggregator.hides_reports

    @property
    def hides_refusals(self) -> bool:
        """Whether silos are not told whose update was not finite, a fact that the noise does not hide."""
        return self.silos and self.hides_clients

    @property
    def is_differentially_private(self) -> bool:
        """Whether differential privacy protects clients or their examples."""
        return self.hides_clients or self.protects_examples

    @property
    def is_private(self) -> bool:
        """Whether differential privacy or secure aggregation protects clients or their examples."""
        return is_private(self.aggregator, self.transforms, self.protects_examples)

    @property
    def measures_clients(self) -> bool:
        """Whether the simulated clock uses the clients' measured training time."""
        return self.durations is not None and self.durations.is_measured

    @property
    def takes_repeats(self) -> bool:
        """Whether a client may take part twice in a round."""
        return self.aggregator.is_sum and not self.protects_examples

    @property
    def transforms_gradients(self) -> bool:
        """Whether the algorithm overrides ``grad_transform``."""
        # The default changes nothing, but calling it would cost Python time in every step of every client.
        return type(self.algorithm).grad_transform is not Algorithm.grad_transform

    def weight_of(self, num_examples: int) -> float:
        """The weight of a client with ``num_examples`` examples."""
        return float(num_examples) if self.weighting == "examples" else 1.0


def is_private(aggregator: Aggregator, transforms: Sequence[Transform], protects_examples: bool) -> bool:
    """Whether differential privacy or secure aggregation protects clients or their examples."""
    return protects_examples or aggregator.hides_reports or any(transform.hides_clients for transform in transforms)


@dataclass(frozen=True)
class Version:
    """A model from which clients have started.

    Args:
        server: The algorithm's server state at that round's start.
        buffers: The shared buffers at that round's start.
    """

    server: State
    buffers: Tree


@dataclass(frozen=True)
class FederationState:
    """The state of a federation between rounds, the same on every rank.

    Args:
        server: The algorithm's server state; empty before the first round.
        transforms: The state of each transform's server half.
        moving: Names of frozen parameters that local training has written to, such as a teacher that is an exponential
            moving average of its student; they are averaged like buffers. None before a round has shown which.
        memory: The aggregator's state from earlier rounds.
        clock: The simulated clock, if the federation has a schedule; None before the first round.
        versions: The models of earlier rounds from which clients are still training, by round.
    """

    server: State = field(default_factory=dict)
    transforms: Sequence[State] = ()
    moving: Sequence[str] | None = None
    memory: State = field(default_factory=dict)
    clock: Clock | None = None
    versions: Mapping[int, Version] = field(default_factory=dict)

    def of_transforms(self, settings: FederationSettings) -> list[State]:
        """The state of each transform; empty for those that have not begun."""
        return [*self.transforms, *({} for _ in settings.transforms[len(self.transforms) :])]
