"""FedCompass: the server chooses each client's number of steps such that groups of clients return together."""

# No `from __future__ import annotations`: jsonargparse would resolve the strings in the modules of the subclasses.
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lightning_fl.aggregation import Transform
from lightning_fl.schedules.buffered import Asynchronous
from lightning_fl.schedules.clock import Clients, Clock, Flush, Job, Visit
from lightning_fl.schedules.staleness import Stale, StalenessFunction
from lightning_fl.types import ClientId


@dataclass(frozen=True)
class Compass(Asynchronous):
    r"""FedCompass: groups clients by arrival time, slow ones with fewer steps; each round aggregates one group.

    A client that starts joins the group in which it can take the most steps, from ``min_steps`` to ``max_steps``,
    before the group returns. If there is none, it opens a group that returns when the fastest client of another group
    could return from its next visit, or after ``max_steps``. For a group :math:`g` of a population of :math:`n` clients

    .. math::
        x \leftarrow x + \frac{|g|}{n}
            \frac{\sum_{i \in g} w_i \, s(\tau_i) \, (y_i - x^{t - \tau_i})}{\sum_{i \in g} w_i}

    All clients are training at any time. ``durations`` are the seconds of ``max_steps`` steps. On a simulated clock no
    client returns later than planned, so the paper's waiting for late clients is not needed.

    Args:
        min_steps: Smallest number of optimizer steps in a visit.
        max_steps: Largest number; the strategy's ``local_steps`` must be the same.
        staleness: The weight :math:`s(\tau)`, as for :class:`Buffered`. None: 1.

    Raises:
        ValueError: Unless ``1 <= min_steps <= max_steps``.

    Reference:
        Li et al., "FedCompass: Efficient Cross-Silo Federated Learning on Heterogeneous Client Devices using a
        Computing Power-Aware Scheduler", ICLR 2024.
    """

    min_steps: int
    max_steps: int
    staleness: StalenessFunction | None = None

    size = 1
    concurrency = None

    def __post_init__(self) -> None:
        if not 1 <= self.min_steps <= self.max_steps:
            raise ValueError(f"{self!r} needs 1 <= min_steps <= max_steps.")

    def check_work(self, local_steps: object, local_epochs: object = None) -> None:
        """See :meth:`RoundSchedule.check_work`."""
        if local_steps != self.max_steps:
            raise ValueError(
                f"{self!r} gives clients up to {self.max_steps} steps, but local_steps={local_steps!r}. Set "
                f"FederatedStrategy(local_steps={self.max_steps})."
            )

    @property
    def transforms(self) -> Sequence[Transform]:
        """See :attr:`RoundSchedule.transforms`."""
        return (Stale(self.staleness, by_share=True),)

    def next(self, clock: Clock, clients: Clients) -> tuple[Flush, Clock]:
        """See :meth:`RoundSchedule.next`."""
        busy = {job.client for job in clock.training}
        idle = [client for client in clients.population.ids if client not in busy]
        timed = [(client, clients.duration(client, clock, offset)) for offset, client in enumerate(idle)]
        # The fastest first, since slower ones adjust to them.
        for client, duration in sorted(timed, key=lambda own: own[1]):
            clock = replace(clock, training=(*clock.training, self._job(client, duration, clock)))
        clock = replace(clock, num_started=clock.num_started + len(idle))
        # A group returns with its last client; of two groups at the same instant, the older one comes first.
        time, group = min((max(job.arrival for job in own), number) for number, own in _groups(clock).items())
        taken = sorted(_groups(clock)[group], key=lambda job: clients.population.position(job.client))
        visits = [Visit(job.client, job.version, part=job.steps / self.max_steps) for job in taken]
        rest = tuple(job for job in clock.training if job.group != group)
        return Flush(time, visits), replace(clock, time=time, version=clock.version + 1, training=rest)

    def _job(self, client: ClientId, duration: int, clock: Clock) -> Job:
        """A client's next visit, in an existing group or in a new one."""
        groups = {number: own for number, own in _groups(clock).items() if max(j.arrival for j in own) > clock.time}
        most = self.max_steps

        def steps_until(instant: int) -> int:
            # In integers: a step that ends exactly at the instant counts.
            return (instant - clock.time) * most // duration

        chosen, group = 0, max(_groups(clock), default=-1) + 1
        for number, own in groups.items():
            steps = steps_until(max(job.arrival for job in own))
            if max(self.min_steps, chosen) <= steps <= most:
                chosen, group = steps, number
        if not chosen:
            ends = (max(job.arrival for job in own) + min(job.duration for job in own) for own in groups.values())
            found = [steps for steps in map(steps_until, ends) if steps <= most]
            chosen = max(self.min_steps, *found) if found else most
        return Job(client, clock.version, clock.time + chosen * duration // most, group, chosen, duration)


def _groups(clock: Clock) -> dict[int, list[Job]]:
    """The clients that are training, by group, the oldest first."""
    groups: dict[int, list[Job]] = {}
    for job in clock.training:
        groups.setdefault(job.group, []).append(job)
    return dict(sorted(groups.items()))
