"""The simulated clock: which client returns when, and from which version. A pure state machine in nanoseconds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lightning_fl.clients.durations import NANOSECONDS, Durations
from lightning_fl.clients.population import Population
from lightning_fl.types import ClientId


class Visit(NamedTuple):
    """One local training whose update is part of a round.

    Attributes:
        client: The client.
        version: The round from whose initial model the client starts; below the round's number if it is stale.
        number: Number of earlier visits of the same client in the same round.
        part: The share of its local work that it finishes, in (0, 1].
    """

    client: ClientId
    version: int
    number: int = 0
    part: float = 1.0


class Job(NamedTuple):
    """A client that has received a model and whose update no round has used yet.

    Attributes:
        client: The client.
        version: The round from whose initial model it started.
        arrival: The time at which it returns, in nanoseconds.
        group: The group with which it returns, for schedules that group clients.
        steps: Its number of optimizer steps, if the schedule sets it.
        duration: The nanoseconds of its full local work, if needed later.
    """

    client: ClientId
    version: int
    arrival: int
    group: int = 0
    steps: int = 0
    duration: int = 0


@dataclass(frozen=True)
class Flush:
    """The visits of a round.

    Args:
        time: The time at which the round closes, in nanoseconds.
        visits: The visits, in the order in which they are aggregated.
        dropped: Clients whose training is discarded, because they were late.
    """

    time: int
    visits: Sequence[Visit]
    dropped: Sequence[ClientId] = ()

    @property
    def seconds(self) -> float:
        """The time at which the round closes, in seconds."""
        return self.time / NANOSECONDS

    def staleness(self, round: int) -> list[int]:
        """The number of visits that are 0, 1, 2, ... server updates old."""
        ages = [round - visit.version for visit in self.visits]
        return [ages.count(age) for age in range(max(ages, default=0) + 1)]


@dataclass(frozen=True)
class Clock:
    """The state of the clock between two rounds.

    Args:
        time: The current time, in nanoseconds.
        version: The number of the next round.
        training: The clients that are training.
        waiting: Clients that have returned and whose updates no round has used yet.
        num_started: Number of visits that have begun.
        measured: The measured seconds by client.
    """

    time: int = 0
    version: int = 0
    training: tuple[Job, ...] = ()
    waiting: tuple[Job, ...] = ()
    num_started: int = 0
    measured: Mapping[ClientId, float] = field(default_factory=dict)

    @property
    def versions(self) -> set[int]:
        """The versions that are still needed."""
        return {job.version for job in (*self.training, *self.waiting)}

    def to_state(self) -> dict[str, Any]:
        """The clock as plain values, for a checkpoint."""
        jobs = {name: [list(job) for job in getattr(self, name)] for name in ("training", "waiting")}
        return {**vars(self), **jobs, "measured": dict(self.measured)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Clock:
        """Restores a clock from the result of :meth:`to_state`."""
        jobs = {name: tuple(Job(*job) for job in state[name]) for name in ("training", "waiting")}
        return cls(**{**state, **jobs})


@dataclass(frozen=True)
class Clients:
    """The clients as a schedule sees them.

    Args:
        population: All clients.
        durations: The clients' durations. None: for a schedule that doesn't need them.
        cohort: Draws the cohort of a round, for schedules whose rounds have one.
        seed: Seed of the federation.
    """

    population: Population
    durations: Durations | None
    cohort: Callable[[int], Sequence[ClientId]]
    seed: int = 0

    def duration(self, client: ClientId, clock: Clock, offset: int = 0) -> int:
        """The nanoseconds of a visit that begins after ``offset`` further visits."""
        assert self.durations is not None
        return self.durations.nanoseconds(client, clock.num_started + offset, self.seed, clock.measured)
