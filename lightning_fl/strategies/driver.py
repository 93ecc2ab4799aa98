"""Drives the rounds of a federation inside Lightning's fit."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_debug
from torch.optim import Optimizer

from lightning_fl.aggregation import FederationFacts
from lightning_fl.algorithms import Decentralized
from lightning_fl.clients import ClientStore, LocalWork, Participation, Population
from lightning_fl.communication import Group, Message, all_hold_the_same
from lightning_fl.engines import LocalTrainer
from lightning_fl.engines.phases import optimizer_entry
from lightning_fl.engines.spread import locals_of
from lightning_fl.engines.tensors import load
from lightning_fl.engines.vectorized.grouping_memory import GroupingMemory, joined_memory
from lightning_fl.engines.vectorized.stacking import NotStackable, NotVectorizable
from lightning_fl.federation import (
    ClientData,
    ClientTask,
    Federation,
    FederationSettings,
    FederationState,
    LoaderFailed,
    Opening,
    Planner,
    RankPlan,
    RankReport,
    Round,
    RoundResult,
)
from lightning_fl.federation.client_batches import ClientBatches, raise_to_user
from lightning_fl.federation.group_data import GroupSplit, StackedData, read_group
from lightning_fl.federation.history import RANK_FIGURES, figures, history_entry, words
from lightning_fl.federation.metric_entries import Entries, as_numbers, merge_entries
from lightning_fl.federation.planner import PlannedGroup
from lightning_fl.federation.rank_verification import digest
from lightning_fl.strategies import internals
from lightning_fl.strategies.batch_steps import BatchOfOne, BatchSteps, HookedSteps, TightSteps, naming_batches_of_one
from lightning_fl.strategies.catching_up import catch_up
from lightning_fl.strategies.client_session import ClientSession
from lightning_fl.strategies.hooks import batch_hook, call_federated_hook, has_hooks
from lightning_fl.strategies.logged_values import LoggedValues, late_entries, monitor_names, publish
from lightning_fl.strategies.loops import OUTSIDE_CLIENTS, RoundEpochLoop
from lightning_fl.strategies.metric_states import MetricStates
from lightning_fl.strategies.only_client import show_kept, take_changes
from lightning_fl.strategies.open_round import OpenRound
from lightning_fl.strategies.probe import probe
from lightning_fl.strategies.rank_sync import RankSync, naming_round
from lightning_fl.strategies.released_model import ReleasedModel, averages_models
from lightning_fl.strategies.root import ROOT, check_root, train_root
from lightning_fl.strategies.round_end import advance_trainer, rank_report
from lightning_fl.strategies.round_loaders import UNKNOWN_LENGTH, RoundLoader, RoundLoaders
from lightning_fl.strategies.round_view import RoundView
from lightning_fl.strategies.user_warnings import UserWarnings
from lightning_fl.strategies.validation import (
    check_algorithm,
    check_gradient_at,
    check_preprocessing,
    check_schedules,
    misconfiguration,
)
from lightning_fl.strategies.vectorized.compatibility import reason_of
from lightning_fl.strategies.vectorized.driver import VectorizedDriver
from lightning_fl.types import Aggregate, ClientId

OnClientError = Literal["raise", "skip"]


@dataclass(frozen=True)
class LastFit:
    """What remains of a fit when it is over; another fit of the same module continues from it.

    Args:
        module: The module that was trained; None if training has not started.
        state: The federation's state.
        store: The clients' states.
        history: One entry for each finished round.
        silos: Whether the clients were silos.
        grouping: What has been found out about training side by side.
    """

    module: L.LightningModule | None
    state: FederationState
    store: ClientStore
    history: list[dict[str, Any]]
    silos: bool
    grouping: GroupingMemory


class RoundDriver:
    """Plans each round, trains its client groups one after the other, and closes it.

    Args:
        trainer: The Trainer.
        population: All clients.
        federation: The way to the other parties.
        settings: The federation's settings.
        participation: Who takes part in a round, and how much each client trains.
        limit: The Trainer's ``limit_train_batches``, for one pass of a client: a count or a share.
        personal: ``fnmatch`` globs of tensors that stay with their client.
        strategy_type: The strategy's class as this package defines it.
        on_client_error: Whether a client whose loader raises ends the run or is left out.
        last: The last ``fit``, whose state is taken over if this ``fit`` does not start at round 0.
    """

    def __init__(
        self,
        trainer: L.Trainer,
        population: Population,
        federation: Federation,
        settings: FederationSettings,
        participation: Participation,
        limit: int | float,
        personal: Sequence[str],
        strategy_type: type,
        on_client_error: OnClientError = "raise",
        last: LastFit | None = None,
    ) -> None:
        self.trainer = trainer
        self.population = population
        self.federation = federation
        self.group = federation.group
        self.settings = settings
        self.participation = participation
        self.limit = limit
        self.personal = personal
        self.sticky = False
        """Whether clients keep state and so must train on their home rank; known when training starts."""
        self.strategy_type = strategy_type
        self.on_client_error = on_client_error
        self.state = FederationState()
        self.store = ClientStore()
        self.history: list[dict[str, Any]] = []
        self.vectorized: VectorizedDriver | None = None
        self.grouping = GroupingMemory()
        """What was known about training side by side when the round began."""
        self.has_started = False
        self.opening: Opening | None = None
        self.apart: Aggregate | None = None
        """The last round's aggregate, if each silo knows its own node's model only since then."""
        self.open_round: OpenRound | None = None
        self.interrupted_loops: dict[str, Any] | None = None
        self.deferred_checkpoints: dict[str, bool] = {}
        self.local_trainer: LocalTrainer | None = None
        self.module_trained: L.LightningModule | None = None
        self.metric_states = MetricStates(trainer.lightning_module, federation.place or federation.group.inner.rank)
        self.warnings = UserWarnings()
        self.rank_sync = RankSync(trainer, federation.group)
        self.released = ReleasedModel()
        self.has_late_values = False
        self.num_bytes_before = 0
        """Bytes sent before the first round, which are counted with it."""
        self.is_closing = False
        """Whether the round is half closed, so that there is neither its start nor its end to save."""
        self.once_closed: Callable[[], None] | None = None
        self.client_metrics: set[str] = set()
        """Names under which clients have logged values, as monitors look them up."""
        self.ends_round = False
        """Whether a round has been closed whose epoch has not ended yet."""
        self._last_steps = (0, 0)
        self.trained_groups: list[tuple[ClientId, ...]] = []
        """The client groups that this rank has trained in the last round, after any splits."""
        self.num_batches_trained = 0
        """Batches, or stacked batches, that this rank has trained in the last round."""
        self.view = RoundView(self)
        self.loader = RoundLoader(self._loader_length)
        self._session: Any = None
        self._found = GroupingMemory()
        self._last = last
        self._is_unsettled = False
        self._trained_last_round = False
        self._placeholders: list[str] = []
        self._plan: RankPlan | None = None
        self.planner = self._make_planner()

    def renew(self, population: Population) -> None:
        """Replaces the clients' loaders."""
        self.population = population
        self.planner = self._make_planner()
        self._plan = None

    def _make_planner(self) -> Planner:
        return Planner(self.population, self.participation, self.settings, self.group, self._describe_failure)

    @property
    def plan(self) -> RankPlan:
        """This rank's plan of the current round; there is none before training starts."""
        assert self._plan is not None, "a round can be viewed only once training has started"
        return self._plan

    @property
    def max_work(self) -> LocalWork:
        """The largest local work of any client in a round."""
        # Read at each use: callbacks such as `GradientAccumulationScheduler` change the accumulation between rounds.
        work = self.participation.max_work(self.limit)
        return replace(work, accumulate=self.trainer.accumulate_grad_batches)

    @property
    def cohort(self) -> Sequence[ClientId]:
        """The clients of the round, wherever they train."""
        return self.plan.cohort if self.opening is None or self.opening.cohort is None else self.opening.cohort

    @property
    def facts(self) -> FederationFacts:
        """Facts of the federation that every rank may know before training starts."""
        is_uniform, population = self.settings.weighting == "uniform", self.population
        max_weight = (lambda: 1.0) if is_uniform else population.max_examples
        sampling = self.settings.sampling
        is_random = sampling is not None and sampling.kind == "poisson"
        cohort_size = len(population) if is_random else len(self.plan.cohort)
        least = 0 if is_random and sampling is not None and sampling.rate < 1 else None
        return FederationFacts(
            population.silos is not None,
            cohort_size,
            is_training=True,
            max_weight=max_weight,
            min_cohort_size=least,
            clients=population.ids,
            seed=self.settings.seed,
            weights=self._weights,
        )

    def _weights(self) -> dict[ClientId, float]:
        sizes = self.population.known_sizes()
        return {client: self.settings.weight_of(size) for client, size in sizes.items()}

    @property
    def module(self) -> L.LightningModule:
        """The user's module."""
        return self.trainer.lightning_module

    @property
    def moving(self) -> Collection[str]:
        """Names of the frozen parameters that rounds move."""
        of_server = () if self.local_trainer is None else self.local_trainer.moving
        return {*(self.state.moving or ()), *of_server}

    @property
    def in_local_phase(self) -> bool:
        """Whether this rank trains its clients, which it does on its own."""
        return self.open_round is not None

    @property
    def _active_trainer(self) -> LocalTrainer:
        assert self.local_trainer is not None
        return self.local_trainer

    @property
    def _active_vectorized(self) -> VectorizedDriver:
        assert self.vectorized is not None
        return self.vectorized

    # ---- the fit

    def start(self, local_trainer: LocalTrainer, vectorized: VectorizedDriver | None) -> None:
        """Called when training starts.

        Args:
            local_trainer: Trains the client groups.
            vectorized: Lets clients train side by side. None: each client trains alone.
        """
        last, self._last = self._last, None
        index = internals.current_round(self.trainer)
        if last is not None and last.module is self.module and index > 0:
            self.state, self.store, self.history, self.grouping = last.state, last.store, last.history, last.grouping
            for phase in range(len(self.settings.algorithm.phases())):
                # Each fit configures its optimizers anew, as with a plain Trainer, so the states of the last fit's are
                # not taken over.
                self.store.drop_entry(optimizer_entry(phase))
        if self.settings.hides_clients and not self.state.transforms:
            self.warnings.new_ledger(self.module)
        self._book_release()
        self.local_trainer = local_trainer
        self.module_trained = self.module
        self.vectorized = vectorized
        self._take_grouping(self.grouping)
        check_algorithm(self.settings.algorithm, self.trainer)
        if self.settings.aggregator.server_data is not None:
            check_root(self.trainer)
        self.settings.algorithm.check_optimizers(local_trainer.optimizers.optimizers)
        self.metric_states = MetricStates(self.module, self.federation.place or self.group.inner.rank)
        self.has_started = True
        # The first plan: only now are the loops restored, and is it known which clients keep state and how they train.
        self.plan_round()
        self._show_kept()
        self._session = self.settings.aggregator.open(self.group, self.facts)

    def _take_grouping(self, memory: GroupingMemory) -> None:
        """Lets the groups of the next rounds depend on what has been found out."""
        self.grouping = self._found = memory
        if self.vectorized is None:
            return
        self.vectorized.grouping.memory = memory
        if memory.is_alone and not self.vectorized.is_asked_for:
            self.vectorized.refuse("some could not train side by side in an earlier round", len(self.history))
            self.vectorized = None

    def _book_release(self) -> None:
        """Lets the transforms record what the datamodule's preprocessing has released about the data."""
        datamodule = getattr(self.trainer, "datamodule", None)
        check_preprocessing(datamodule, self.settings)
        release = getattr(datamodule, "release", None)
        if release is not None:
            states = self.state.of_transforms(self.settings)
            booked = [t.book(own, release) for t, own in zip(self.settings.transforms, states, strict=True)]
            self.state = replace(self.state, transforms=booked)

    def plan_round(self) -> None:
        """Draws the current round's cohort, and sets this rank's number of batches in Lightning's loops."""
        index, plan, work = internals.current_round(self.trainer), self._plan, self.max_work
        if plan is None or plan.round != index or plan.max_work != work:
            grouping = None if self.vectorized is None else self.vectorized.grouping
            with misconfiguration():
                self._plan = self.planner.plan(index, work, grouping, sticky=self.sticky, clock=self.state.clock)
        self.set_length()

    def open_next(self) -> None:
        """Waits for the next round, and catches up with the federation if it has gone on without this party.

        Raises:
            StopIteration: If no other round follows for this party.
        """
        trainer, done = self.trainer, internals.current_round(self.trainer) - 1
        self.check_released("in validation or at the epoch's end")
        opening = self.federation.open_round(done)
        is_over = opening is None
        opening = opening or self.federation.ending(done)
        if opening is not None and opening.state is not None:
            self.state = opening.state
            catch_up(trainer, opening, self.personal, self.group.is_spread)
            self.released.forget()
        if is_over or internals.is_after_last(trainer):
            raise StopIteration
        self.opening = opening

    # ---- a round

    def run_round(self, loop: RoundEpochLoop) -> None:
        """Runs a round: each client group trains on its batches, then their updates become the next global model."""
        opened = self._open(loop)
        steps = opened.steps
        # A client's `on_train_batch_end` of its last batch must see the finished client, and that of the round's last
        # batch the global model. So `end_batch` comes late: after `_finish`, and after `_close` if nothing is pending.
        for task in self._tasks(opened):
            try:
                self._train(opened, task)
            except LoaderFailed as failed:
                self._leave_out(opened, failed)
                continue
            except Exception as error:
                if self._trains_as_group(task.clients):
                    self._undo(opened, task, error)
                elif isinstance(error, BatchOfOne):
                    self._leave_out(opened, LoaderFailed(task.clients[0], error))
                else:
                    raise
                continue
            self._finish(opened, task)
            if opened.pending:
                steps.end_batch()
        # A resumed loop that has counted no batch is taken for one whose round has not begun.
        if not steps.is_open:
            steps.skip()
        self._close(opened)
        with opened.round.trainer.isolation.after_round():
            steps.end_round()
        loop.position = OUTSIDE_CLIENTS

    def _trains_as_group(self, clients: Sequence[ClientId]) -> bool:
        return len(clients) > 1 or (self.vectorized is not None and self.vectorized.engine.stacks_one)

    def _train(self, opened: OpenRound, task: ClientTask) -> None:
        """Trains a client group on its batches."""
        steps, is_group = opened.steps, self._trains_as_group(task.clients)
        if is_group:
            opened.num_batches_before = opened.num_batches_done
            steps.hold()
        for batch, position in task.batches:
            self._look_at_first(opened, batch)
            with naming_batches_of_one():
                steps.train(task, batch, position, ends_round=position.is_last and not opened.pending)
            opened.num_batches_done += 1
            if not position.is_last:
                if position.ends_phase:
                    self._flush_logs(opened)
                    opened.session.end_phase(task.counts)
                steps.end_batch()
            if position.ends_phase and not is_group:
                self.call_hook("on_phase_end", *task.clients)
        if is_group:
            self._active_vectorized.check()
            steps.release()

    def _undo(self, opened: OpenRound, task: ClientTask, error: Exception) -> None:
        """Undoes the steps of a group, whose clients are trained again one after the other.

        Raises:
            Exception: If the user has requested that they train together: the error.
        """
        vectorized = self._active_vectorized
        is_too_large = isinstance(error, torch.OutOfMemoryError) and len(task.clients) > 1
        if vectorized.is_asked_for and not is_too_large:
            raise vectorized.error_of(error) from error
        opened.round.leave()
        opened.steps.undo()
        opened.session.drop()
        opened.num_batches_done = opened.num_batches_before
        vectorized.undo()
        if is_too_large:
            self._split(opened, vectorized.halve(task.clients))
        else:
            self._train_alone(opened, reason_of(error))

    def _train_alone(self, opened: OpenRound, reason: str) -> None:
        """Lets the clients of the current group, and all later ones, train one after the other."""
        self._found = replace(self._active_vectorized.grouping.memory, is_alone=True)
        self._active_vectorized.refuse(reason, self.plan.round)
        self.vectorized = None
        # The plan's remaining groups were formed for training side by side too.
        opened.pending = deque(self.plan.alone([opened.current, *opened.pending]))
        self.set_length()

    def _open(self, loop: RoundEpochLoop) -> OpenRound:
        trainer, index = self.trainer, internals.current_round(self.trainer)
        # Again, because a callback such as `GradientAccumulationScheduler` may have changed the accumulation window in
        # `on_train_epoch_start`; the number of batches of an optimizer step depends on it.
        self.plan_round()
        check_gradient_at(self.settings.algorithm, self.trainer)  # for the same reason
        self._take_optimizers()
        if self._shows_kept:
            take_changes(self._active_trainer.optimizers, self.store, self.population.ids[0])
        elif not self._active_trainer.optimizers.are_fresh:
            self.warnings.optimizer_state(index)
        loop.is_round_done = False
        if not averages_models(trainer):  # which may put the mean of the rounds' models in at the epoch's start
            self.check_released("at the epoch's start")
        self.released.forget()
        loops_before = internals.loops_before_round(trainer)
        schedules = check_schedules(internals.client_schedules(trainer), self.settings, self.max_work)
        round = Round.open(
            self.settings,
            self.state,
            self._active_trainer,
            self.store,
            self.federation,
            index,
            self.cohort,
            [schedule for _, schedule in schedules],
            self._session,
        )
        # Privacy budget that the transforms have spent stays spent, even if the round fails.
        self.state = replace(self.state, transforms=round.state.transforms)
        results = internals.train_results(trainer)
        # They stand for values that only other ranks have logged, with settings from these ranks. `self.log` of the
        # same name on this rank would find settings that are not its own.
        for key in self._placeholders:
            results.pop(key, None)
        self._placeholders = []
        self.metric_states.mark()
        values = LoggedValues()
        # A silo's hooks run for its own client, those of a simulation's ranks for all.
        values.before_clients(results, self.group.inner.size if self.population.silos else self.group.size)
        opened = OpenRound(
            round=round,
            loaders=RoundLoaders(
                self.plan,
                self.population,
                self.settings.seed,
                lambda visit: opened.following(visit),
                round.restore_randomness,
                trainer.overfit_batches > 0,  # type: ignore[attr-defined]
                self.warnings,
            ),
            steps=self._make_steps(loop, values),
            values=values,
            pending=deque(),
            schedules=schedules,
            first_step=trainer.global_step,
            first_logger_step=internals.logger_steps(trainer),
            loops_before=loops_before,
            paused=internals.pause_by_step(trainer, averages=not self._is_alone),
            failed=dict(self.plan.failed),
        )
        # After the form of the steps has been chosen, which may let each client train alone.
        opened.pending.extend(self.plan.planned if self.vectorized is not None else self.plan.alone(self.plan.planned))
        self.open_round = opened
        self.set_length()
        self.trained_groups = []
        self.call_hook("on_round_start", index, self.cohort)
        return opened

    @property
    def _has_new_optimizers(self) -> bool:
        return [*map(id, self._active_trainer.optimizers.optimizers)] != [*map(id, self.trainer.optimizers)]

    def _take_optimizers(self) -> None:
        """Goes on with other optimizers, if a callback has replaced them since the last round."""
        if not self._has_new_optimizers:
            return
        self.settings.algorithm.check_optimizers(self.trainer.optimizers)
        self._active_trainer.optimizers.take(self.trainer.optimizers)
        for phase in range(len(self.settings.algorithm.phases())):
            self.store.drop_entry(optimizer_entry(phase))  # they are those of other optimizers

    @property
    def _shows_kept(self) -> bool:
        """Whether hooks between rounds see the state that the only client's optimizer keeps, as in a plain Trainer."""
        local = self.local_trainer
        return (
            local is not None
            and local.client_optimizer == "keep"
            and len(self.population) == 1
            and self.group.rank == 0
            and len(self.settings.algorithm.phases()) == 1
            # A hook could publish what noise is to protect.
            and not self.settings.is_private
            and not local.within.is_spread
        )

    def _show_kept(self) -> None:
        if self._shows_kept:
            show_kept(self._active_trainer.optimizers, self.store, self.population.ids[0])

    def _make_steps(self, loop: RoundEpochLoop, values: LoggedValues) -> BatchSteps:
        hook = batch_hook(self.trainer, self.strategy_type)
        rank_zero_debug("The local loop is tight." if hook is None else f"Batches pass Lightning's hooks: {hook}.")
        if self.vectorized is not None and hook is not None and not self.vectorized.is_asked_for:
            self.vectorized.refuse(f"{hook} would see several clients at once", self.plan.round)
            self.vectorized = None
        if self.vectorized is not None:
            self.vectorized.choose_steps(hook)
        return (TightSteps if hook is None else HookedSteps)(loop, self._active_trainer, values)

    @property
    def _is_alone(self) -> bool:
        return self.federation.size == 1 and len(self.population) == 1

    def _tasks(self, opened: OpenRound) -> Iterator[ClientTask]:
        """Yields the client groups of this rank, each loaded when its turn comes."""
        while opened.pending:
            opened.current = opened.pending.popleft()
            try:
                yield self._start(opened, opened.current)
            except GroupSplit as split:
                self._split(opened, split.parts)
            except (NotStackable, NotVectorizable) as error:
                self._train_alone(opened, str(error))
            except LoaderFailed as failed:
                self._leave_out(opened, failed)

    def _split(self, opened: OpenRound, parts: Sequence[Sequence[ClientId]]) -> None:
        opened.split(parts)
        self.set_length()

    def _start(self, opened: OpenRound, group: PlannedGroup) -> ClientTask:
        opened.session = ClientSession(internals.train_results(self.trainer), opened.values, self.metric_states)
        # Each client starts at the round's step, so that what reads `global_step` does not depend on which clients this
        # rank has trained before.
        opened.steps.loop.set_global_step(opened.first_step)
        opened.steps.loop.position = OUTSIDE_CLIENTS
        if self._has_new_optimizers:
            raise MisconfigurationException(
                f"The Trainer's optimizers were replaced inside round {self.plan.round}, so that clients would train "
                "differently. Replace them between rounds, as in on_train_epoch_start."
            )
        if self._trains_as_group(group.clients):
            return self._start_group(opened, group)
        (client,) = group.clients
        works = self.planner.phases(self.plan.works[client])
        data = ClientData(opened.loaders.open(client, works, group.number), self.plan.sizes[client])
        task = opened.round.start(
            data,
            partial(probe, self.trainer),
            group.version,
            group.number,
            on_next_phase=lambda: self.call_hook("on_next_phase", client),
        )
        self.call_hook("on_client_start", client)
        return task

    def _start_group(self, opened: OpenRound, group: PlannedGroup) -> ClientTask:
        vectorized = self._active_vectorized
        vectorized.begin()
        try:
            data = self._read_group(opened, group)
            task = opened.round.start(data, version=group.version, number=group.number)
            if vectorized.start(task, data):
                opened.round.leave()
                task = opened.round.start(data, version=group.version, number=group.number)
                vectorized.start(task, data)
            if data.masks is not None and vectorized.try_new_shapes(data):
                raise GroupSplit(vectorized.grouping.split(data.works))
        except (GroupSplit, torch.OutOfMemoryError, NotStackable, NotVectorizable) as error:
            opened.round.leave()
            vectorized.undo_reading()
            vectorized.leave()
            if isinstance(error, torch.OutOfMemoryError) and len(group.clients) > 1:
                raise GroupSplit(vectorized.halve(group.clients)) from error
            raise
        return task

    def _read_group(self, opened: OpenRound, group: PlannedGroup) -> StackedData:
        vectorized, loaders, clients = self._active_vectorized, opened.loaders, group.clients

        def open_client(client: ClientId) -> ClientBatches:
            batches = loaders.open_ahead(client, self.planner.phases(self.plan.works[client]), group.number)
            vectorized.note_loader(batches.loader)
            return batches

        try:
            data = read_group(
                vectorized.grouping,
                clients,
                open_client,
                lambda client: self.plan.lengths[client] or 0,
                self.plan.sizes,
                lambda failed: self._note_failure(opened, failed),
            )
        except GroupSplit as split:
            vectorized.tell_of_split(split.parts)
            raise
        finally:
            loaders.leave()
        vectorized.end_reading()
        try:
            # Stacks the first batches now, so that a group that can't be stacked is split before its clients are
            # loaded.
            _ = data.first
        except NotStackable as error:
            if len(clients) == 1:
                raise
            parts = [[client] for client in clients]
            vectorized.grouping.remember(data.works, parts)
            vectorized.tell_of_split(parts)
            raise GroupSplit(parts) from error
        return data

    def _look_at_first(self, opened: OpenRound, batch: Any) -> None:
        """Records the first batch of a silo's first round, to warn of silos that have the same data."""
        if not opened.first_batch and self._compares_first_batches:
            opened.first_batch = digest(batch)

    @property
    def _compares_first_batches(self) -> bool:
        return self.group.size > 1 and self.settings.silos and not self.history and not self.settings.is_private

    def _flush_logs(self, opened: OpenRound) -> None:
        opened.steps.flush_logs()
        if self.vectorized is not None:
            self.vectorized.flush_logs()

    def _finish(self, opened: OpenRound, task: ClientTask) -> None:
        session, clients = opened.session, task.clients
        num_shared_steps = opened.round.trainer.optimizers.num_steps
        self._flush_logs(opened)
        session.end_phase(task.counts, is_last=True)
        outcome = opened.round.finish(task)
        opened.has_trained = True
        self.trained_groups.append(clients)
        if self._trains_as_group(clients):
            logged = session.finish(outcome.accepted, self._active_vectorized.restrict_to)
            self._active_vectorized.leave()
            # The loggers' x-axis advances as if the clients had trained one after the other.
            opened.more_logger_steps += outcome.num_steps - num_shared_steps
        else:
            # A silo whose refusal is hidden must not show it by metrics that are missing.
            logged = session.finish([True] if self.settings.hides_refusals else outcome.accepted)
            self.call_hook("on_client_end", clients[0], replace(outcome.runs[0], logged=logged), outcome.update)
        self.call_hook("on_group_end", clients)
        if self.plan.num_batches(opened.current) is None:
            self.set_length()

    def _leave_out(self, opened: OpenRound, failed: LoaderFailed) -> None:
        """Leaves the client that is being trained out of the round."""
        self._note_failure(opened, failed)
        opened.round.leave()
        opened.steps.drop_logs()
        opened.session.drop()
        if opened.steps.is_open:
            opened.steps.end_batch()
        self.set_length()

    def _note_failure(self, opened: OpenRound, failed: LoaderFailed) -> None:
        opened.failed[failed.client] = self._describe_failure(failed)

    def _describe_failure(self, failed: LoaderFailed) -> str:
        if self.on_client_error == "raise":
            raise_to_user(failed)
        error = failed.error.with_traceback(None)  # its frames would keep the loader's workers alive
        return f"{type(error).__name__}: {error}"

    def _train_root(self, opened: OpenRound) -> None:
        """Trains on the server's own data, if the aggregator has such: on the first rank, with the work of a client."""
        loader, update = self.settings.aggregator.server_data, None
        if loader is None:
            return
        if self.group.rank == 0:
            works, index = self.planner.phases(self.max_work), self.plan.round
            batches = ClientBatches(ROOT, loader, works, index, self.max_work)
            try:
                update = train_root(self.trainer, opened.round, batches)
            except LoaderFailed as failed:
                raise_to_user(failed)
        opened.round.take_root(update)

    def _close(self, opened: OpenRound) -> None:
        """Turns what all ranks have trained into the next global model, and tells Lightning and the callbacks of it."""
        found = self._found if self.vectorized is None else self.vectorized.grouping.memory
        # What batches look like is a client's own affair where clients are private, and a silo trains alone.
        tells = not self.settings.is_private and not self.settings.silos
        reports, result = self._join(opened, found.since(self.grouping) if tells else GroupingMemory())
        self._note_released()
        # This ends the local phase: from here on the strategy's collectives concern all ranks, which the checkpoints
        # and the logged figures below need.
        self.state, self.open_round = self._on_clock(result, opened.round), None
        self.apart = None if result.aggregate.neighbours is None else result.aggregate
        self._take_grouping(joined_memory(self.grouping, result.report.grouping) if tells else found)
        self.num_batches_trained = opened.num_batches_done
        self._is_unsettled, self._trained_last_round = True, opened.has_trained
        self.ends_round = True
        self.deferred_checkpoints = dict(reports[0].deferred_checkpoints)
        self._last_steps = opened.first_step, opened.first_step + result.report.num_steps
        self._publish(opened, reports, result)
        # A rank that stopped alone would leave the others waiting in the next round.
        self.trainer.should_stop = result.report.should_stop or result.closing.stop_reason is not None
        self.call_hook("on_aggregate_end", result.aggregate)
        self.check_released("in on_aggregate_end")
        # Only now that the round is closed is there a global model to save or to average.
        internals.resume_by_step(opened.paused)
        # A client alone trains as in a plain Trainer, where the callback has averaged at each step.
        if not self._is_alone:
            internals.average_passed_steps(self.trainer, *self._last_steps)

    def _join(self, opened: OpenRound, news: GroupingMemory) -> tuple[list[RankReport], RoundResult]:
        """Joins the updates and reports of all ranks; the module then holds the next global model.

        Args:
            opened: The round.
            news: What this rank tells the others of training side by side.
        """
        index, round = self.plan.round, opened.round
        self._train_root(opened)
        # Before the merge, which restores the process's own random generators: the loaders' were entered after them.
        opened.loaders.close()
        if self.group.inner.size > 1:
            self._join_metrics(self.group.inner)
        report = rank_report(self.trainer, opened, self.plan, self.metric_states, self.deferred_checkpoints, news)
        with naming_round(f"Round {index}", "The round is dropped. "), misconfiguration():
            reports = round.merge(report)
            # A rank without a batch holds what no other holds.
            if self._compares_first_batches and all_hold_the_same(
                self.group, opened.first_batch or os.urandom(16), "first batch"
            ):
                self.warnings.same_data(self.group.size)
            if self.settings.is_private and self.group.size > 1:
                self.warnings.untold_failures(index, opened.failed)
            if self.settings.hides_refusals:
                self.warnings.untold_refusals(index, round.totals.refused)
            self.warnings.data(index, reports)
            self.is_closing = True
            result = round.close(reports, opened.loaders.seconds_waiting)
        self._show_kept()
        num_bytes, self.num_bytes_before = result.num_bytes + self.num_bytes_before, 0
        return reports, replace(result, num_bytes=num_bytes)

    def _publish(self, opened: OpenRound, reports: Sequence[RankReport], result: RoundResult) -> None:
        """Passes what the clients have logged and the round's figures on to Lightning, with the warnings they give."""
        trainer, index, warnings = self.trainer, self.plan.round, self.warnings
        logged = advance_trainer(trainer, opened, result.report, self._last_steps[1])
        self.metric_states.merge([(own.metric_states, own.tensors) for own in reports], self.module.device)
        self.publish(logged)
        self.client_metrics |= monitor_names(logged)
        self.has_late_values = result.report.has_late_values
        if self.settings.is_differentially_private:
            warnings.monitors(trainer, logged)
        warnings.result(index, result)
        warnings.put_back(opened.round.trainer.isolation.changed)
        warnings.max_steps(trainer, [config for config, _ in opened.schedules], result.report)
        self.history.append(history_entry(index, result, self.plan.dropped, self.plan.flush))
        if has_hooks(trainer, "on_train_batch_end"):  # which may look at the global model, and change it
            self.join_nodes()
        internals.log_figures(trainer, figures(self.history[-1], result.hides_clients), RANK_FIGURES)
        warnings.words(trainer, words(self.history[-1]))

    def _join_metrics(self, inner: Group) -> None:
        """Joins the torchmetrics of the processes of a silo, which report as one."""
        own = Message(*self.metric_states.report())
        messages = inner.all_gather(own, f"metrics of round {self.plan.round} in the silo")
        self.metric_states.merge([(message.fields, message.tensors) for message in messages], self.module.device)

    def join_nodes(self) -> None:
        """Brings the models of all nodes to all silos, and their mean into the module; a collective.

        After a round each silo knows its own only, so that it talks to its neighbours and to nobody else.
        """
        aggregate, self.apart = self.apart, None
        if aggregate is None:
            return
        algorithm = self.settings.algorithm
        assert isinstance(algorithm, Decentralized)
        self.check_released("after the round")
        server = algorithm.join(self.state.server, aggregate)
        self.state = replace(self.state, server=server)
        load(self._active_trainer.tensors.params, server["params"])
        self._note_released()
        found = algorithm.report(server)
        self.history[-1].update(found)
        internals.log_figures(self.trainer, figures({**found, "seconds": {}}), RANK_FIGURES)

    def _on_clock(self, result: RoundResult, round: Round) -> FederationState:
        """The state with the clock after the round, and the versions from which clients are still training."""
        clock = self.plan.clock
        if clock is not None and result.report.client_seconds:
            clock = replace(clock, measured={**clock.measured, **dict(result.report.client_seconds)})
        needed = set() if clock is None else clock.versions
        versions = {index: version for index, version in round.versions.items() if index in needed}
        return replace(result.state, clock=clock, versions=versions)

    # ---- after a round

    def _note_released(self) -> None:
        if self.settings.is_differentially_private:
            self.released.note(self.module, self._active_trainer.tensors)

    def check_released(self, when: str) -> None:
        """Under differential privacy, makes sure that nothing but the server has changed the model since the round."""
        self.released.check(f"{when} of round {self.history[-1]['round']}" if self.history else when)

    def end_training(self) -> None:
        """Called before the hooks of the training's end."""
        self.check_released("in validation or at the epoch's end")
        if averages_models(self.trainer):
            self.released.forget()

    def settle(self) -> None:
        """Called after the hooks of the round's last batch: brings what they changed to all ranks."""
        # The hook also runs after all other batches, where it may be a part of training that is clipped and noised,
        # such as a teacher that follows.
        if not self.settings.protects_examples:
            self.warnings.put_back_after_round(self.plan.round, self.released.put_back())
        self.check_released("in on_train_batch_end, after the last batch")
        # Lightning calls this also for a resumed loop that has nothing left to train; a collective may follow a round
        # only.
        is_new, self._is_unsettled = self._is_unsettled, False
        if is_new:
            tensors = locals_of(self._active_trainer.tensors.all)
            self.rank_sync.settle(self.plan.round, tensors, self._trained_last_round)
        self.is_closing = False
        if self.once_closed is not None:
            waiting, self.once_closed = self.once_closed, None
            waiting()

    def after_round(self) -> None:
        """Called at the epoch's end, after validation: joins the values that were logged after the round was closed."""
        if self.has_late_values:
            late = Message(as_numbers(late_entries(internals.train_results(self.trainer))))
            self.publish(merge_entries(self.rank_sync.gather(self.plan.round, late, "late metrics")))

    def end_round(self) -> None:
        """Called when all that monitors the round has seen it: writes the checkpoints that have waited for its end."""
        self.ends_round = False
        deferred, self.deferred_checkpoints = self.deferred_checkpoints, {}
        # What is left of a round that a checkpoint was written in ends here too; that checkpoint stays as it is.
        is_own = self._last_steps != (0, 0)
        outdated = internals.outdated_last_checkpoints(self.trainer) if is_own else {}
        for path in outdated:
            if self.trainer.is_global_zero and os.path.islink(path):  # save_last="link": to the best, which stays
                os.unlink(path)
        for path, weights_only in {**outdated, **deferred}.items():
            self.trainer.save_checkpoint(path, weights_only)
        if is_own:
            internals.renew_named_last_checkpoints(self.trainer)
        internals.save_passed_steps(self.trainer, *self._last_steps)

    def may_consult(self, judge: Any, metric: str) -> bool:
        """Whether a callback or a schedule may decide by a metric, because the last round has measured it.

        A round without clients measures nothing in training.
        """
        if not self.history or self.history[-1]["num_clients"]:
            return True
        if metric not in self.client_metrics and metric in self.trainer.callback_metrics:
            return True
        self.warnings.not_consulted(self.history[-1]["round"], type(judge).__name__, metric)
        return False

    def agree_to_stop(self) -> None:
        """Stops all ranks if the hooks of one have set ``trainer.should_stop`` since the round's end."""
        self.rank_sync.stop(self.plan.round)

    def publish(self, entries: Entries) -> None:
        """Writes joined values into Lightning's results, also on ranks that have not logged them."""
        results = internals.train_results(self.trainer)
        # A single client's last step is the last one, as in a plain Trainer; of several, callbacks on all ranks monitor
        # the same value.
        of_step = not self._is_alone
        self._placeholders += publish(entries, results, self.module, self.module.device, of_step)

    def interrupt(self) -> None:
        """Called when an exception ends the fit: rolls the round back."""
        opened, self.open_round = self.open_round, None
        if self.vectorized is not None:
            self.vectorized.leave()
        if opened is not None:
            opened.abandon()
            # A callback that saves on an exception saves after this one; with the loops inside the round, a resume
            # would skip the rest of the round although the model is back at its start.
            self.interrupted_loops = opened.loops_before

    def stop(self) -> None:
        """Called at the end of the fit: removes the hooks from the optimizers."""
        if self.vectorized is not None:
            self.vectorized.close()
        if self.local_trainer is not None:
            self.local_trainer.optimizers.close()
            self.local_trainer.optimizers.make_fresh()  # a checkpoint may follow
            self.local_trainer = None

    # ---- checkpoints

    @property
    def so_far(self) -> LastFit:
        """What stays of this fit."""
        silos = self.population.silos is not None
        return LastFit(self.module_trained, self.state, self.store, self.history, silos, self.grouping)

    def forget_last_fit(self) -> None:
        """Takes nothing over from the last fit of the same objects, because this one starts from a checkpoint."""
        self._last = None

    def progress(self) -> dict[str, Any]:
        """What a checkpoint keeps of the rounds so far, beside the federation's state."""
        metrics = internals.monitored_metrics(self.trainer, training=self.ends_round)
        return {
            "history": self.history,
            "metrics": {name: value.detach().cpu() for name, value in metrics.items()},
            "client_metrics": sorted(self.client_metrics),
            "ends_round": self.ends_round,
            # What batches look like may tell who has taken part. A private run can't be repeated bit for bit anyway.
            "grouping": (GroupingMemory() if self.settings.is_private else self.grouping).pack(),
        }

    def resume(self, state: FederationState, progress: Mapping[str, Any]) -> None:
        """Restores the federation's state and what :meth:`progress` returned from a checkpoint."""
        self.state, self.history = state, progress["history"]
        self.client_metrics = set(progress.get("client_metrics", ()))
        internals.restore_metrics(self.trainer, progress.get("metrics", {}))
        # Checkpoints of older versions do not say.
        self.grouping = GroupingMemory.unpack(progress.get("grouping", {}))
        self.ends_round = progress.get("ends_round", False)
        if self.ends_round:
            fit_loop: Any = self.trainer.fit_loop
            fit_loop.end_resumed_round()

    @property
    def defers_checkpoints(self) -> bool:
        """Whether a checkpoint waits for the round's end, because there is no whole round to resume from yet."""
        return self.open_round is not None or self._is_unsettled

    def rewind(self, checkpoint: dict[str, Any]) -> None:
        """Puts the start of an unfinished round into a checkpoint; training itself goes on undisturbed."""
        if self.open_round is not None:
            self.open_round.rewind(checkpoint, self.trainer)
        elif self._shows_kept:  # it is in the client's state, from which a resumed run takes it
            for own, fresh in zip(
                checkpoint["optimizer_states"], self._active_trainer.optimizers.fresh_states(), strict=True
            ):
                own["state"] = fresh
        if self.interrupted_loops is not None:
            checkpoint["loops"]["fit_loop"] = self.interrupted_loops

    def defer_checkpoint(self, path: str, weights_only: bool) -> None:
        """Records a checkpoint to be written at the round's end."""
        if self.open_round is not None:
            self.warnings.deferred_checkpoint()
        self.deferred_checkpoints[path] = weights_only

    def forget_deferred(self, path: str) -> bool:
        """Cancels a deferred checkpoint; returns whether there was one."""
        return self.deferred_checkpoints.pop(path, None) is not None

    # ---- the round's length

    @property
    def num_batches(self) -> int | None:
        """Batches of this rank in the round, None if unknown; a rank that trains nobody counts one."""
        if self._plan is None:
            return None
        opened = self.open_round
        groups = self.plan.planned if opened is None else opened.pending
        lengths = [self.plan.num_batches(group) for group in groups]
        if None in lengths:
            return None
        total = sum(length for length in lengths if length is not None)
        # Lightning ends the whole fit if a rank has 0 batches, and the other ranks would wait for it.
        return max(1, total + (0 if opened is None else opened.num_batches_done))

    def _loader_length(self) -> int | None:
        """The length of the loader that Lightning gets, None if unknown.

        Raises:
            TypeError: If it is asked for before training starts, and clients have loaders without a length.
        """
        if self.has_started or internals.is_setting_up_data(self.trainer):
            return self.num_batches
        # The user's module asks, for a schedule by step, which goes on with the largest client.
        largest = self.largest_num_batches()
        if largest == float("inf"):
            raise TypeError("The training loaders of some clients have no length, and so the largest is unknown.")
        return int(largest)

    def set_length(self) -> None:
        """Sets the round's number of batches in Lightning's loops."""
        internals.set_round_length(self.trainer, self.num_batches, UNKNOWN_LENGTH)

    def largest_num_batches(self) -> int | float:
        """Batches of the client with the most in a round, rounded up to whole optimizer steps.

        Raises:
            MisconfigurationException: If that depends on the data of silos on other machines.
        """
        phases = self.planner.phases(self.max_work)
        if not self.federation.knows_all_clients and any(phase.steps is None for phase in phases):
            raise MisconfigurationException(
                "trainer.estimated_stepping_batches needs the number of steps of the largest silo, which the others do "
                "not know. Give all the same number with FederatedStrategy(local_steps=...), or use schedules by epoch."
            )
        with misconfiguration():
            return self.planner.largest_num_batches(self.max_work)

    # ---- hooks

    def join_gradients(self) -> None:
        """Called after a backward pass that Lightning runs: averages the gradients over the processes of the silo."""
        opened = self.open_round
        # By hand the module may step after any of its backward passes.
        if opened is not None and (opened.steps.loop.position.ends_window or not self.module.automatic_optimization):
            opened.round.trainer.join_gradients()

    def prepare_gradients(self, optimizer: Optimizer) -> None:
        """Called in a step that Lightning runs, when the gradients are unscaled and not yet clipped."""
        if self.open_round is not None:
            trainer, loop = self.open_round.round.trainer, self.open_round.steps.loop
            trainer.batch = loop.batch, loop.position.offset
            trainer.prepare_gradients(optimizer)

    def call_hook(self, hook: str, *args: Any) -> None:
        """Calls a hook of :class:`~lightning_fl.callbacks.FederatedCallback`."""
        call_federated_hook(self.trainer, self.view, hook, *args)
