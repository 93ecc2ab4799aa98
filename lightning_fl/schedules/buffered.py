"""Asynchronous rounds: the server updates the model whenever enough updates have arrived."""

# No `from __future__ import annotations`: jsonargparse would resolve the strings in the modules of the subclasses.
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lightning_fl.aggregation import Transform
from lightning_fl.schedules.clock import Clients, Clock, Flush, Job, Visit
from lightning_fl.schedules.schedule import RoundSchedule
from lightning_fl.schedules.staleness import Mixed, Stale, StalenessFunction
from lightning_fl.seeding import round_rng
from lightning_fl.types import ClientId


class Asynchronous(RoundSchedule):
    """Asynchronous rounds: no client waits for another.

    Each client that returns is replaced by one that trains from the newest version, drawn from the idle clients.
    Updates that arrive at the same instant are all applied, in the order of clients, before any client starts again.
    """

    draws_cohorts = False
    size: int
    """Number of updates in a round."""
    concurrency: int | None
    """Clients that train at the same time; None: all."""
    max_staleness: int | None = None
    """Largest accepted staleness of an update, in server updates; None: any."""

    def __post_init__(self) -> None:
        if self.size < 1 or (self.concurrency is not None and self.concurrency < 1):
            raise ValueError(f"{self!r} needs a size and a concurrency of at least 1.")
        if self.max_staleness is not None and self.max_staleness < 0:
            raise ValueError(f"{self!r} needs a max_staleness of at least 0.")

    def clients_per_round(self, given: int | float | None) -> int | float | None:
        """See :meth:`RoundSchedule.clients_per_round`."""
        if given is not None:
            raise ValueError(
                f"{self!r} has no cohorts, so clients_per_round={given} would be ignored. Leave it out: `size` is the "
                "number of updates in a round, `concurrency` the number of clients that train at the same time."
            )
        return None

    def check(self, num_clients: int) -> None:
        """See :meth:`RoundSchedule.check`."""
        if self.concurrency is not None and self.concurrency > num_clients:
            raise ValueError(
                f"{self!r} needs {self.concurrency} clients to train at the same time, but the federation has "
                f"{num_clients}. Lower concurrency."
            )

    def next(self, clock: Clock, clients: Clients) -> tuple[Flush, Clock]:
        """See :meth:`RoundSchedule.next`."""
        dropped: list[ClientId] = []
        # All updates of an instant are flushed before any client starts again.
        while len((clock := self._drop(clock, dropped)).waiting) < self.size:
            clock = self._take_in(self._start(clock, clients), clients)
        taken, waiting = clock.waiting[: self.size], clock.waiting[self.size :]
        visits: list[Visit] = []
        for job in taken:
            number = sum(visit.client == job.client for visit in visits)
            visits.append(Visit(job.client, job.version, number))
        return Flush(clock.time, visits, dropped), replace(clock, version=clock.version + 1, waiting=waiting)

    def _drop(self, clock: Clock, dropped: list[ClientId]) -> Clock:
        """Drops arrived updates that are too stale."""
        if self.max_staleness is None:
            return clock
        oldest = clock.version - self.max_staleness
        dropped += [job.client for job in clock.waiting if job.version < oldest]
        return replace(clock, waiting=tuple(job for job in clock.waiting if job.version >= oldest))

    def _start(self, clock: Clock, clients: Clients) -> Clock:
        """Starts idle clients from the newest version, up to ``concurrency``."""
        concurrency = len(clients.population) if self.concurrency is None else self.concurrency
        drawn = _draw_idle(clock, clients, concurrency - len(clock.training))
        started = [
            Job(client, clock.version, clock.time + clients.duration(client, clock, offset))
            for offset, client in enumerate(drawn)
        ]
        return replace(clock, training=(*clock.training, *started), num_started=clock.num_started + len(started))

    def _take_in(self, clock: Clock, clients: Clients) -> Clock:
        """Advances to the next instant at which clients return."""
        time = min(job.arrival for job in clock.training)
        arrived = [job for job in clock.training if job.arrival == time]
        arrived.sort(key=lambda job: clients.population.position(job.client))
        training = tuple(job for job in clock.training if job.arrival != time)
        return replace(clock, time=time, training=training, waiting=(*clock.waiting, *arrived))


@dataclass(frozen=True)
class Buffered(Asynchronous):
    r"""FedBuff: a round closes when ``size`` updates have arrived, each from the version at which its client started.

    .. math::
        x \leftarrow x + \frac{\sum_i w_i \, s(\tau_i) \, (y_i - x^{t - \tau_i})}{\sum_i w_i}

    With ``weighting="uniform"`` that is the paper's :math:`\frac{1}{K} \sum_i s(\tau_i) \Delta_i`. If all clients are
    equally fast and ``size`` is their number, it is FedAvg.

    Args:
        size: Number of updates in a round.
        concurrency: Clients that train at the same time. None: all.
        staleness: The weight :math:`s(\tau)` of an update that is :math:`\tau` server updates old, such as
            ``fl.schedules.Polynomial(0.5)``. None: 1.
        max_staleness: Largest accepted staleness, in server updates; older updates are dropped. None: no limit.

    Raises:
        ValueError: If a number is out of range.

    Reference:
        Nguyen et al., "Federated Learning with Buffered Asynchronous Aggregation", AISTATS 2022.
    """

    size: int
    concurrency: int | None = None
    staleness: StalenessFunction | None = None
    max_staleness: int | None = None

    @property
    def transforms(self) -> Sequence[Transform]:
        """See :attr:`RoundSchedule.transforms`."""
        return () if self.staleness is None else (Stale(self.staleness),)


@dataclass(frozen=True)
class FedAsync(Asynchronous):
    r"""FedAsync: the server mixes each client's model into its own as soon as it arrives.

    .. math::
        x \leftarrow (1 - \alpha \, s(\tau)) \, x + \alpha \, s(\tau) \, y_i

    Args:
        alpha: The share :math:`\alpha` of a fresh model, in (0, 1]. Default 0.6.
        staleness: :math:`s(\tau)`, as for :class:`Buffered`. None: 1.
        concurrency: Clients that train at the same time. None: all.
        max_staleness: Largest accepted staleness, in server updates; older updates are dropped. None: no limit.

    Raises:
        ValueError: If an argument is out of range.

    Reference:
        Xie et al., "Asynchronous Federated Optimization", 2019.
    """

    alpha: float = 0.6
    staleness: StalenessFunction | None = None
    concurrency: int | None = None
    max_staleness: int | None = None

    @property
    def size(self) -> int:  # type: ignore[override]
        """Number of updates in a round."""
        return 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.alpha <= 1:
            raise ValueError(f"FedAsync got alpha={self.alpha}; expected a share in (0, 1].")

    @property
    def transforms(self) -> Sequence[Transform]:
        """See :attr:`RoundSchedule.transforms`."""
        return (Mixed(self.alpha, self.staleness),)


def _draw_idle(clock: Clock, clients: Clients, count: int) -> list[ClientId]:
    """Draws clients that are not training, in the order of clients."""
    population = clients.population
    busy = sorted(population.position(job.client) for job in clock.training)
    num_idle = len(population) - len(busy)
    if count >= num_idle:
        places: Sequence[int] = range(num_idle)
    else:
        # While no client is training, the draw is that of a `Uniform` cohort: with equal durations, and as many updates
        # in a round as clients train, the rounds are those of FedAvg.
        purpose = f"start {clock.num_started}" if busy else "cohort"
        rng = round_rng(clients.seed, clock.version, purpose)
        places = sorted(rng.choice(num_idle, count, replace=False, shuffle=False).tolist())
    # Maps the n-th idle client to its position among all by skipping the busy ones before it.
    gaps = [position - index for index, position in enumerate(busy)]
    return [population.ids[place + bisect_right(gaps, place)] for place in places]
