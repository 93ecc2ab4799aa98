"""The interface of schedules, and the one in which a round waits for all its clients."""

# No `from __future__ import annotations`: jsonargparse would resolve the strings in the modules of the subclasses.
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from lightning_fl.aggregation import Transform
from lightning_fl.schedules.clock import Clients, Clock, Flush, Visit
from lightning_fl.types import ClientId


class RoundSchedule(ABC):
    """When a round closes and which visits it takes in, on a simulated clock.

    Arrival times do not depend on the values of the model, so a schedule only plans: it says for each round which
    clients it takes in and from which version of the model each of them has started.
    """

    draws_cohorts: ClassVar[bool] = True
    """Whether the clients of a round are a cohort that starts with the round, as ``clients_per_round`` says."""
    needs_durations: ClassVar[bool] = True
    """Whether it has to be told how long clients take."""
    seeds_by_version: ClassVar[bool] = False
    """Whether a client's random numbers are those of the round from whose model it starts, not of the one that takes
    it in."""

    def clients_per_round(self, given: int | float | None) -> int | float | None:
        """How many clients start in a round.

        Args:
            given: The strategy's ``clients_per_round``.

        Raises:
            ValueError: If it would be ignored.
        """
        return given

    def check(self, num_clients: int) -> None:
        """Makes sure that the schedule fits so many clients.

        Raises:
            ValueError: If it does not.
        """
        return

    def check_work(self, local_steps: object, local_epochs: object = None) -> None:
        """Makes sure that the schedule fits the strategy's ``local_steps`` and ``local_epochs``.

        Raises:
            ValueError: If it does not.
        """
        return

    @property
    def transforms(self) -> Sequence[Transform]:
        """What happens to updates because of their staleness, before all other transforms."""
        return ()

    @abstractmethod
    def next(self, clock: Clock, clients: Clients) -> tuple[Flush, Clock]:
        """Plans the round with the number ``clock.version``; returns what it takes in, and the clock after it."""


@dataclass(frozen=True)
class Synchronous(RoundSchedule):
    """A round waits for the slowest client of its cohort. The rounds are those without a schedule, with their times."""

    def next(self, clock: Clock, clients: Clients) -> tuple[Flush, Clock]:
        """See :meth:`RoundSchedule.next`."""
        timed = durations_of_cohort(clock, clients)
        time = clock.time + max((duration for _, duration in timed), default=0)
        return close(clock, Flush(time, [Visit(client, clock.version) for client, _ in timed]), len(timed))


def durations_of_cohort(clock: Clock, clients: Clients) -> list[tuple[ClientId, int]]:
    """The clients of the round's cohort, each with its nanoseconds."""
    cohort = clients.cohort(clock.version)
    return [(client, clients.duration(client, clock, offset)) for offset, client in enumerate(cohort)]


def close(clock: Clock, flush: Flush, num_started: int) -> tuple[Flush, Clock]:
    """A round that leaves nobody training, and the clock after it."""
    next_clock = replace(clock, time=flush.time, version=clock.version + 1, num_started=clock.num_started + num_started)
    return flush, next_clock
