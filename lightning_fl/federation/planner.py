"""What one rank does in a round, worked out before it begins."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lightning_fl.clients import Participation, ParticipationSampler, Population
from lightning_fl.clients.local_work import LocalWork
from lightning_fl.communication import Group, Message
from lightning_fl.data.client_loaders import Loader, count_batches
from lightning_fl.federation.plan import RoundPlan
from lightning_fl.federation.report_masking import check_steps
from lightning_fl.federation.round import FederationSettings
from lightning_fl.strategies.vectorized.compatibility import BatchForecast, outlook
from lightning_fl.strategies.vectorized.driver import VectorizedDriver
from lightning_fl.types import ClientId


@dataclass(frozen=True)
class RankPlan:
    """A round as one rank sees it.

    Args:
        plan: Which batch belongs to which client.
        works: How much each client of the cohort trains.
        dropped: Stragglers that are left out.
        num_examples: Of each client of this rank the examples of one pass, None where that shows only in training.
        empty: Clients of this rank without data.
        failed: What the loaders of clients of this rank have raised.
        loaders: Loaders of those of them that train together first; the planning has looked at them.
    """

    plan: RoundPlan
    works: Mapping[ClientId, LocalWork]
    dropped: list[ClientId]
    num_examples: dict[ClientId, int | None]
    empty: list[ClientId]
    failed: dict[ClientId, str]
    loaders: dict[ClientId, Loader]

    def take_loader(self, client: ClientId, population: Population) -> Loader:
        """A client's loader: that of the planning the first time, a new one from then on."""
        return self.loaders.pop(client) if client in self.loaders else population.loaders[client]


class Planner:
    """Plans the rounds of one rank.

    Args:
        population: All clients.
        participation: Who takes part in a round, and how much each client trains.
        settings: What does not change from round to round.
        group: The ranks of the federation.
        at_home: Whether clients keep state and so must train on their home rank.
        failure: Describes what a client's loader has raised, or raises itself.
    """

    def __init__(
        self,
        population: Population,
        participation: Participation,
        settings: FederationSettings,
        group: Group,
        at_home: bool,
        failure: Callable[[ClientId, Exception], str],
    ) -> None:
        self.population = population
        self.settings = settings
        self.group = group
        self.at_home = at_home
        self._failure = failure
        self.draws = ParticipationSampler(participation, population, settings.seed, group)
        self._largest: int | float | None = None

    def plan(self, index: int, work: LocalWork, together: VectorizedDriver | None) -> RankPlan:
        """The round ``index``.

        Args:
            index: Number of the round.
            work: How much the client that trains the most trains.
            together: Lets clients train side by side. None: each alone.
        """
        population = self.population
        drawn = self.draws.cohort(index)
        works = self.draws.works(index, drawn, work)
        clients: list[ClientId] = []
        outlooks: dict[ClientId, BatchForecast | None] = {}
        kept: dict[ClientId, Loader] = {}
        segments: list[Sequence[int | None]] = []
        examples: dict[ClientId, int | None] = {}
        empty: list[ClientId] = []
        failed: dict[ClientId, str] = {}
        num_kept = 0 if together is None else together.max_clients
        for client in population.place(list(works), self.group.size, self.at_home, works)[self.group.rank]:
            try:
                loader = population.loaders[client]
                num_batches = count_batches(loader)
                own = [phase.segments(num_batches) for phase in self.phases(works[client])]
            except Exception as error:
                failed[client] = self._failure(client, error)
                continue
            if not all(own):
                empty.append(client)
                continue
            clients += [client] * len(own)
            segments += own
            examples[client] = population.num_examples(client, loader)
            if together is not None:
                is_known = examples[client] is not None
                outlooks[client] = outlook(loader, own[0], works[client].pass_length(num_batches)) if is_known else None
                if len(kept) < num_kept:
                    kept[client] = loader
        units = None if together is None else together.group(outlooks)

        def num_steps_of(unit: Sequence[ClientId]) -> int | None:
            assert together is not None
            ticks = together.ticks([outlook.work for client in unit if (outlook := outlooks[client]) is not None])
            return None if ticks is None else len(ticks)

        plan = RoundPlan(index, list(works), clients, segments, work.accumulate, units, num_steps_of)
        dropped = [client for client in drawn if client not in works]
        return RankPlan(plan, works, dropped, examples, empty, failed, kept)

    def phases(self, work: LocalWork) -> list[LocalWork]:
        """A client's work, phase by phase."""
        return [work.for_phase(phase) for phase in self.settings.algorithm.phases()]

    def largest_num_batches(self, work: LocalWork) -> int | float:
        """Batches of the client with the most in a round, rounded up to whole optimizer steps."""
        if self._largest is None:
            check_steps("trainer.estimated_stepping_batches", self.settings, work)
            loaders = self.population.loaders
            phases = self.phases(work)
            all_by_steps = all(phase.steps is not None for phase in phases)
            clients = [next(iter(loaders))] if all_by_steps else loaders  # here all do the most
            steps = [phase.num_steps(count_batches(loaders[client])) for client in clients for phase in phases]
            own = float("inf") if None in steps else float(max(step for step in steps if step is not None))
            told = self.group.all_gather(Message({"steps": own}), "estimated steps")
            largest = max(float(message.fields["steps"]) for message in told)
            self._largest = largest if largest == float("inf") else max(int(largest), 1) * work.accumulate
        return self._largest
