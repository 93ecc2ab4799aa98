"""Rounds that close at a deadline, or with the fastest clients."""

# No `from __future__ import annotations`: jsonargparse would resolve the strings in the modules of the subclasses.
from dataclasses import dataclass
from typing import Literal

from lightning_fl.clients.durations import NANOSECONDS
from lightning_fl.schedules.clock import Clients, Clock, Flush, Visit
from lightning_fl.schedules.schedule import RoundSchedule, close, durations_of_cohort


@dataclass(frozen=True)
class Deadline(RoundSchedule):
    """A round closes at a deadline, or sooner if all clients of its cohort have returned.

    Args:
        seconds: The deadline, in seconds after the round's start.
        late: ``"drop"``: a client that has not finished is left out; ``"partial"``: it contributes the optimizer steps
            that it has finished, at least one.

    Raises:
        ValueError: If an argument is out of range.
    """

    seconds: float
    late: Literal["drop", "partial"] = "drop"

    def __post_init__(self) -> None:
        if not self.seconds > 0:
            raise ValueError(f"Deadline got seconds={self.seconds}; expected a positive number.")
        if self.late not in ("drop", "partial"):
            raise ValueError(f"Deadline got late={self.late!r}; expected 'drop' or 'partial'.")

    def next(self, clock: Clock, clients: Clients) -> tuple[Flush, Clock]:
        """See :meth:`RoundSchedule.next`."""
        timed, limit = durations_of_cohort(clock, clients), max(1, round(self.seconds * NANOSECONDS))
        visits = [
            Visit(client, clock.version, part=min(1.0, limit / duration))
            for client, duration in timed
            if duration <= limit or self.late == "partial"
        ]
        dropped = [client for client, duration in timed if duration > limit and self.late == "drop"]
        time = clock.time + min(limit, max((duration for _, duration in timed), default=0))
        return close(clock, Flush(time, visits, dropped), len(timed))


@dataclass(frozen=True)
class Fastest(RoundSchedule):
    """Over-selection: more clients start than are needed; a round closes when the fastest have returned.

    The others are dropped, so the model does not learn from clients that are always slow.

    Args:
        k: Number of clients whose updates a round applies.
        of: Number of clients that start; replaces ``clients_per_round``.

    Raises:
        ValueError: Unless ``1 <= k <= of``.

    Reference:
        Bonawitz et al., "Towards Federated Learning at Scale: System Design", MLSys 2019 (of = 1.3 k).
    """

    k: int
    of: int

    def __post_init__(self) -> None:
        if not 1 <= self.k <= self.of:
            raise ValueError(f"{self!r} needs 1 <= k <= of.")

    def clients_per_round(self, given: int | float | None) -> int | float | None:
        """See :meth:`RoundSchedule.clients_per_round`."""
        if given is not None:
            raise ValueError(
                f"{self!r} starts {self.of} clients, so clients_per_round={given} would be ignored. Leave it out."
            )
        return self.of

    def next(self, clock: Clock, clients: Clients) -> tuple[Flush, Clock]:
        """See :meth:`RoundSchedule.next`."""
        timed = durations_of_cohort(clock, clients)
        # Stable: of two that arrive at the same instant, the first in the order of clients is used.
        fastest = sorted(timed, key=lambda own: own[1])[: self.k]
        taken = {client for client, _ in fastest}
        visits = [Visit(client, clock.version) for client, _ in timed if client in taken]
        dropped = [client for client, _ in timed if client not in taken]
        return close(clock, Flush(clock.time + fastest[-1][1], visits, dropped), len(timed))
