"""Plans what one rank does in a round, before the round begins."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from lightning_fl.clients import LocalWork, Participation, ParticipationSampler, Population
from lightning_fl.communication import Group, Message
from lightning_fl.data.client_loaders import Loader, count_batches
from lightning_fl.engines.vectorized.forecast import BatchForecast, forecast_batches
from lightning_fl.engines.vectorized.grouping import Grouping
from lightning_fl.federation.client_batches import LoaderFailed
from lightning_fl.federation.errors import ConfigurationError
from lightning_fl.federation.report_masking import check_steps
from lightning_fl.federation.settings import FederationSettings
from lightning_fl.schedules import Clients, Clock, Flush, Visit
from lightning_fl.types import ClientId


@dataclass(frozen=True)
class PlannedGroup:
    """Clients that train side by side, from the same version of the model.

    Args:
        clients: The clients.
        version: The round with whose first model they start.
        number: How many other visits of these clients in the round come before.
        num_steps: The number of steps that clients with unequal work take; None: as many as each client has batches.
    """

    clients: tuple[ClientId, ...]
    version: int
    number: int = 0
    num_steps: int | None = None

    def of(self, clients: Sequence[ClientId]) -> PlannedGroup:
        """Some of the clients as a group."""
        return replace(self, clients=tuple(clients), num_steps=None)


@dataclass(frozen=True)
class RankPlan:
    """A round as one rank sees it.

    Args:
        round: Number of the round.
        max_work: The largest local work of any client.
        works: The local work of each client of the cohort.
        visits: Who trains in the round, on all ranks, without dropped stragglers.
        dropped: Stragglers and late clients that are left out.
        flush: What the round takes in on the simulated clock; None if there is none.
        clock: The clock after the round.
        planned: This rank's client groups, in the order of training; each client has at least one batch.
        sizes: For each client of this rank, the number of examples in one pass; None if known only after training.
        lengths: For each client of this rank, its number of batches in the round; None if known only after training.
        empty: Clients of this rank without data.
        failed: For each client of this rank whose loader raised, the description of the error.
        loaders: Loaders that were made while planning, to be used by the clients that train first.
    """

    round: int
    max_work: LocalWork
    works: Mapping[ClientId, LocalWork]
    visits: Sequence[Visit]
    dropped: Sequence[ClientId]
    flush: Flush | None = None
    clock: Clock | None = None
    planned: Sequence[PlannedGroup] = ()
    sizes: Mapping[ClientId, int | None] = field(default_factory=dict)
    lengths: Mapping[ClientId, int | None] = field(default_factory=dict)
    empty: Sequence[ClientId] = ()
    failed: Mapping[ClientId, str] = field(default_factory=dict)
    loaders: Mapping[ClientId, Loader] = field(default_factory=dict)

    @cached_property
    def cohort(self) -> Sequence[ClientId]:
        """The clients of the round, on all ranks; one that comes twice stands twice."""
        return [visit.client for visit in self.visits]

    @property
    def groups(self) -> list[tuple[ClientId, ...]]:
        """This rank's client groups, as clients."""
        return [group.clients for group in self.planned]

    @property
    def clients(self) -> list[ClientId]:
        """This rank's clients."""
        return [client for group in self.groups for client in group]

    def num_batches(self, group: PlannedGroup) -> int | None:
        """The number of steps that a group takes; None if it is known only after training."""
        return self.lengths[group.clients[0]] if group.num_steps is None else group.num_steps

    def alone(self, groups: Sequence[PlannedGroup]) -> list[PlannedGroup]:
        """The clients as groups of one, in the order in which they would train if no group had been formed."""
        order = {client: place for place, client in enumerate(self.sizes)}
        alone = [group.of([client]) for group in groups for client in group.clients]
        return sorted(alone, key=lambda group: (group.number, group.version, order[group.clients[0]]))


class Planner:
    """Plans the rounds of one rank.

    Args:
        population: All clients.
        participation: Who takes part in a round, and how much each client trains.
        settings: The federation's settings.
        group: The ranks of the federation.
        describe_failure: Describes the error of a client's loader, or raises it.
    """

    def __init__(
        self,
        population: Population,
        participation: Participation,
        settings: FederationSettings,
        group: Group,
        describe_failure: Callable[[LoaderFailed], str],
    ) -> None:
        self.population = population
        self.settings = settings
        self.group = group
        self.describe_failure = describe_failure
        self.sampler = ParticipationSampler(participation, population, settings.seed, group)
        # The estimate costs a collective and, with work by epochs, every client's loader, but it may be asked for
        # repeatedly.
        self._largest: int | float | None = None

    def plan(
        self,
        index: int,
        max_work: LocalWork,
        grouping: Grouping | None = None,
        *,
        sticky: bool = False,
        clock: Clock | None = None,
    ) -> RankPlan:
        """Plans a round.

        Args:
            index: Number of the round.
            max_work: The largest local work of any client.
            grouping: Forms groups of clients that train side by side. None: each client trains alone.
            sticky: Whether clients keep state and so must train on their home rank.
            clock: The simulated clock. None: it begins with this round, if there is one.

        Raises:
            ConfigurationError: If a client comes twice in the round and may not.
        """
        plan = self._draw(index, max_work, sticky, clock)
        # Only those that train are placed; dropped stragglers would count as load on their ranks.
        own = self.population.place(list(plan.works), self.group.size, sticky, plan.works)[self.group.rank]
        plan, forecasts = self._inspect(plan, own, grouping)
        return replace(plan, planned=_form_groups(plan.visits, forecasts, grouping))

    def _draw(self, index: int, max_work: LocalWork, sticky: bool, clock: Clock | None) -> RankPlan:
        """Who trains in the round, on all ranks, and how much."""
        schedule = self.settings.schedule
        if schedule is None:
            drawn = self.sampler.cohort(index)
            works = self.sampler.works(index, drawn, max_work)
            dropped = [client for client in drawn if client not in works]
            return RankPlan(index, max_work, works, [Visit(client, index) for client in works], dropped)
        if clock is None or clock.version != index:
            clock = Clock(version=index, time=0 if clock is None else clock.time)
        clients = Clients(self.population, self.settings.durations, self.sampler.cohort, self.settings.seed)
        flush, clock = schedule.next(clock, clients)
        if sticky or not self.settings.takes_repeats:
            check_visits(index, flush.visits)
        works = self._works(index, flush.visits, max_work)
        return RankPlan(index, max_work, works, flush.visits, flush.dropped, flush, clock)

    def _inspect(
        self, plan: RankPlan, clients: Sequence[ClientId], grouping: Grouping | None
    ) -> tuple[RankPlan, dict[ClientId, BatchForecast | None]]:
        """Adds what the loaders of this rank's clients tell; returns also a forecast for each client with batches."""
        sizes: dict[ClientId, int | None] = {}
        lengths: dict[ClientId, int | None] = {}
        forecasts: dict[ClientId, BatchForecast | None] = {}
        loaders: dict[ClientId, Loader] = {}
        empty: list[ClientId] = []
        failed: dict[ClientId, str] = {}
        for client in clients:
            work = plan.works[client]
            try:
                loader = self.population.loaders[client]
                num_batches = count_batches(loader)
                segments = [phase.segments(num_batches) for phase in self.phases(work)]
            # Loaders, and their `__len__`, are the user's code and may raise anything.
            except Exception as error:
                failed[client] = self.describe_failure(LoaderFailed(client, error))
                continue
            if not all(segments):
                empty.append(client)
                continue
            known = [length for of_phase in segments for length in of_phase if length is not None]
            lengths[client] = sum(known) if len(known) == sum(map(len, segments)) else None
            sizes[client] = self.population.num_examples(client, loader)
            forecasts[client] = None
            if grouping is None:
                continue
            if sizes[client] is not None:
                forecasts[client] = forecast_batches(loader, segments[0], work.pass_length(num_batches))
            # The first group finds its loaders ready; to keep all would cost memory in the number of clients.
            if len(loaders) < grouping.max_clients:
                loaders[client] = loader
        found = replace(plan, sizes=sizes, lengths=lengths, empty=empty, failed=failed, loaders=loaders)
        return found, forecasts

    def _works(self, index: int, visits: Sequence[Visit], max_work: LocalWork) -> dict[ClientId, LocalWork]:
        """The local work of the clients that a round takes in, in the order of clients."""
        clients = sorted({visit.client for visit in visits}, key=self.population.position)
        works = dict(self.sampler.works(index, clients, max_work))
        parts = {visit.client: visit.part for visit in visits if visit.part < 1}
        return works | {client: replace(works[client], part=part, cut=True) for client, part in parts.items()}

    def phases(self, work: LocalWork) -> list[LocalWork]:
        """A client's local work, phase by phase."""
        return [work.for_phase(phase) for phase in self.settings.algorithm.phases()]

    def largest_num_batches(self, work: LocalWork) -> int | float:
        """Batches of the client with the most in a round, rounded up to whole optimizer steps."""
        if self._largest is None:
            check_steps("trainer.estimated_stepping_batches", self.settings, work)
            loaders = self.population.loaders
            phases = self.phases(work)
            all_by_steps = all(phase.steps is not None for phase in phases)
            clients = [next(iter(loaders))] if all_by_steps else loaders  # by steps, every client takes equally many
            steps = [phase.num_steps(count_batches(loaders[client])) for client in clients for phase in phases]
            # Infinity rather than None: it survives `max` over clients and ranks if any of them has no length.
            own = float("inf") if None in steps else float(max(step for step in steps if step is not None))
            reports = self.group.all_gather(Message({"steps": own}), "estimated steps")
            # Ranks hold different clients, but learning-rate schedules must have the same length on all of them.
            largest = max(float(message.fields["steps"]) for message in reports)
            # Counted in batches, because Lightning divides by the accumulation again.
            self._largest = largest if largest == float("inf") else max(int(largest), 1) * work.accumulate
        return self._largest


def _form_groups(
    visits: Sequence[Visit], forecasts: Mapping[ClientId, BatchForecast | None], grouping: Grouping | None
) -> list[PlannedGroup]:
    # Clients that train side by side start from one model, and none of them twice.
    together: dict[tuple[int, int], set[ClientId]] = {}
    for visit in visits:
        together.setdefault((visit.number, visit.version), set()).add(visit.client)
    planned = []
    for (number, version), clients in sorted(together.items()):
        own = {client: forecast for client, forecast in forecasts.items() if client in clients}
        for group in [[client] for client in own] if grouping is None else grouping.group(own):
            known = [forecast for client in group if (forecast := own[client]) is not None]
            num_steps = grouping.num_steps(known) if grouping is not None and len(group) > 1 else None
            planned.append(PlannedGroup(tuple(group), version, number, num_steps))
    return planned


def check_visits(index: int, visits: Sequence[Visit]) -> None:
    """Makes sure that no client comes twice in a round.

    Raises:
        ConfigurationError: If one does.
    """
    repeated = next((visit for visit in visits if visit.number), None)
    if repeated is not None:
        raise ConfigurationError(
            f"Round {index} takes in client {repeated.client!r} twice, because it is fast. Where clients keep state "
            "between rounds, where the aggregator is not a weighted mean, or where differential privacy protects "
            "examples, a client may come once in a round. Lower the schedule's `size`, or use an algorithm without "
            "client state and the mean."
        )
