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
    """Decides when a round closes and which visits it aggregates, on a simulated clock.

    Arrival times do not depend on the values of the model, so a schedule only plans: for each round it returns the
    clients whose updates it aggregates, and the version of the model from which each of them started.
    """

    draws_cohorts: ClassVar[bool] = True
    """Whether the clients of a round are a cohort of ``clients_per_round`` that starts with the round."""
    needs_durations: ClassVar[bool] = True
    """Whether it needs the clients' durations."""
    seeds_by_version: ClassVar[bool] = False
    """Whether a client's random numbers are those of the round from whose model it starts, not of the round that
    aggregates its update."""

    def clients_per_round(self, given: int | float | None) -> int | float | None:
        """The number of clients that start in a round.

        Args:
            given: The strategy's ``clients_per_round``.

        Raises:
            ValueError: If it would be ignored.
        """
        return given

    def check(self, num_clients: int) -> None:
        """Checks that the schedule fits the number of clients.

        Raises:
            ValueError: If it does not.
        """
        return

    def check_work(self, local_steps: object, local_epochs: object = None) -> None:
        """Checks that the schedule fits the strategy's ``local_steps`` and ``local_epochs``.

        Raises:
            ValueError: If it does not.
        """
        return

    @property
    def transforms(self) -> Sequence[Transform]:
        """The transforms for stale updates, which run before all other transforms."""
        return ()

    @abstractmethod
    def next(self, clock: Clock, clients: Clients) -> tuple[Flush, Clock]:
        """Plans the round with the number ``clock.version``; returns its visits, and the clock after it."""


@dataclass(frozen=True)
class Synchronous(RoundSchedule):
    """A round waits for the slowest client of its cohort. The rounds are those without a schedule, but timed."""

    def next(self, clock: Clock, clients: Clients) -> tuple[Flush, Clock]:
        """See :meth:`RoundSchedule.next`."""
        timed = durations_of_cohort(clock, clients)
        time = clock.time + max((duration for _, duration in timed), default=0)
        return close(clock, Flush(time, [Visit(client, clock.version) for client, _ in timed]), len(timed))


def durations_of_cohort(clock: Clock, clients: Clients) -> list[tuple[ClientId, int]]:
    """The clients of the round's cohort, each with its duration in nanoseconds."""
    cohort = clients.cohort(clock.version)
    return [(client, clients.duration(client, clock, offset)) for offset, client in enumerate(cohort)]


def close(clock: Clock, flush: Flush, num_started: int) -> tuple[Flush, Clock]:
    """Closes a round after which no client is training; returns it and the clock after it."""
    next_clock = replace(clock, time=flush.time, version=clock.version + 1, num_started=clock.num_started + num_started)
    return flush, next_clock
