"""The simulated clock: who returns when, and from which version. A pure state machine of whole nanoseconds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lightning_fl.clients.durations import NANOSECONDS, Durations
from lightning_fl.clients.population import Population
from lightning_fl.types import ClientId


class Visit(NamedTuple):
    """One training of a client that goes into a round.

    Attributes:
        client: The client.
        version: The round with whose first model the client starts; smaller than the round's number if it is stale.
        number: How many other visits of the same client in the same round come before.
        part: The share of its local work that it finishes, in (0, 1].
    """

    client: ClientId
    version: int
    number: int = 0
    part: float = 1.0


class Job(NamedTuple):
    """A client that has got a model and has not been taken in.

    Attributes:
        client: The client.
        version: The round with whose first model it has started.
        arrival: The instant at which it returns.
        group: The clients with which it returns, for schedules that group them.
        steps: Its optimizer steps, if the schedule sets them.
        duration: The nanoseconds of its whole local work, if they matter later.
    """

    client: ClientId
    version: int
    arrival: int
    group: int = 0
    steps: int = 0
    duration: int = 0


@dataclass(frozen=True)
class Flush:
    """What a round takes in.

    Args:
        time: The instant at which the round closes, in nanoseconds.
        visits: The visits, in the order in which they are taken in.
        dropped: Clients that have trained in vain, because they were late.
    """

    time: int
    visits: Sequence[Visit]
    dropped: Sequence[ClientId] = ()

    @property
    def seconds(self) -> float:
        """The instant at which the round closes, in seconds."""
        return self.time / NANOSECONDS

    def staleness(self, round: int) -> list[int]:
        """How many visits are 0, 1, 2, ... server updates old."""
        ages = [round - visit.version for visit in self.visits]
        return [ages.count(age) for age in range(max(ages, default=0) + 1)]


@dataclass(frozen=True)
class Clock:
    """The state of the clock between two rounds.

    Args:
        time: The instant, in nanoseconds.
        version: The number of the next round.
        training: The clients that are training.
        waiting: Those that have returned, and whose updates no round has taken in.
        num_started: Visits that have begun.
        measured: The measured seconds of clients.
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
        """Reads what :meth:`to_state` returned."""
        jobs = {name: tuple(Job(*job) for job in state[name]) for name in ("training", "waiting")}
        return cls(**{**state, **jobs})


@dataclass(frozen=True)
class Clients:
    """What a schedule may ask about the clients.

    Args:
        population: All clients.
        durations: How long they take. None: for a schedule that need not know.
        cohort: Draws the cohort of a round, for schedules whose rounds have one.
        seed: Seed of the federation.
    """

    population: Population
    durations: Durations | None
    cohort: Callable[[int], Sequence[ClientId]]
    seed: int = 0

    def duration(self, client: ClientId, clock: Clock, offset: int = 0) -> int:
        """The nanoseconds of the visit that begins after ``offset`` others from now on."""
        assert self.durations is not None
        return self.durations.nanoseconds(client, clock.num_started + offset, self.seed, clock.measured)
