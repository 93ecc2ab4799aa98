"""The rounds of a federation inside Lightning's training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any, Literal

import lightning as L
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim import Optimizer

from lightning_fl.aggregation import FederationFacts
from lightning_fl.clients import ClientStore, Participation, Population
from lightning_fl.communication import Group, Message
from lightning_fl.data.client_loaders import Loader, count_batches
from lightning_fl.engines import Schedule, SequentialEngine
from lightning_fl.engines.phases import optimizer_entry
from lightning_fl.federation.history import figures, round_entry, words
from lightning_fl.federation.plan import BatchPosition, RoundPlan
from lightning_fl.federation.planner import Planner
from lightning_fl.federation.rank_verification import digest
from lightning_fl.federation.report_masking import check_schedules
from lightning_fl.federation.round import FederationSettings, FederationState, Round, RoundResult
from lightning_fl.federation.round_loader import UNKNOWN_LENGTH, LoadTogether, RoundLoader, raise_error
from lightning_fl.strategies import internals as internals
from lightning_fl.strategies import metrics
from lightning_fl.strategies import results as logged
from lightning_fl.strategies.client_randomness import ClientReading
from lightning_fl.strategies.rank_sync import RankSync, naming_round
from lightning_fl.strategies.user_warnings import UserWarnings
from lightning_fl.strategies.validation import check_algorithm
from lightning_fl.strategies.vectorized.driver import NotStackable, NotVectorizable, VectorizedDriver
from lightning_fl.types import ClientId

OnClientError = Literal["raise", "skip"]


class RoundDriver:
    """Plans each round, switches clients at their last batches, and closes the round after the last of them.

    Args:
        trainer: The Trainer.
        population: All clients.
        group: The ranks of the federation.
        settings: What does not change from round to round.
        participation: Who takes part in a round, and how much each client trains.
        limit: Batches of one local pass, as a count or a share.
        at_home: Whether clients keep state and so must train on their home rank.
        on_client_error: Whether a client whose loader raises ends the run or is left out.
        last: The rounds of the Trainer's last ``fit``, which go on if this one does not start at round 0.
    """

    def __init__(
        self,
        trainer: L.Trainer,
        population: Population,
        group: Group,
        settings: FederationSettings,
        participation: Participation,
        limit: int | float,
        at_home: bool,
        on_client_error: OnClientError = "raise",
        last: RoundDriver | None = None,
    ) -> None:
        self.trainer = trainer
        self.group = group
        self.settings = settings
        self.participation = participation
        self.work = participation.max_work(limit)
        self.at_home = at_home
        self.on_client_error = on_client_error
        self.state = FederationState()
        self.store = ClientStore()
        self.history: list[dict[str, Any]] = []
        self.together: VectorizedDriver | None = None
        self.has_started = False
        self.in_local_phase = False
        self.interrupted_loops: dict[str, Any] | None = None
        self.round: Round | None = None
        self.engine: SequentialEngine | None = None
        self.session: Any = None
        self.engine_module: L.LightningModule | None = None
        self.schedules: list[tuple[Any, Schedule]] = []
        self._last = last
        self._has_late_values = False
        self._is_unsettled = False
        self._deferred: dict[str, bool] = {}
        self._placeholders: list[str] = []
        self._notices = UserWarnings()
        self._agreement = RankSync(trainer, group)
        self._reading = ClientReading(trainer, settings.seed, self._notices)
        self.renew(population)

    def renew(self, population: Population) -> None:
        """Takes new loaders of the clients."""
        self.population = population
        self.planner = Planner(population, self.participation, self.settings, self.group, self.at_home, self._failure)
        self.loader = RoundLoader(
            lambda client: self.planned.take_loader(client, population),
            lambda: (self.plan, self.work),
            self._open_round,
            self._open_client,
            self.set_length,
            self._fail_client,
            lambda client: self.planner.phases(self.planned.works[client]),
            self._open_together,
            lambda client, loader: self._reading.prefetch(self.plan.round, client, loader),
        )
        self._plan(internals.current_round(self.trainer))

    @property
    def facts(self) -> FederationFacts:
        """What everyone may know before training starts."""
        is_uniform, population = self.settings.weighting == "uniform", self.population
        max_weight = (lambda: 1.0) if is_uniform else population.max_examples
        sampling = self.settings.sampling
        is_random = sampling is not None and sampling.kind == "poisson"
        cohort_size = len(population) if is_random else len(self.plan.cohort)
        least = 0 if is_random and sampling is not None and sampling.rate < 1 else None
        return FederationFacts(population.silos is not None, cohort_size, True, max_weight, least)

    @property
    def module(self) -> L.LightningModule:
        """The user's module."""
        return self.trainer.lightning_module

    # ---- hooks of Lightning, in the order in which they come

    def start(self, engine: SequentialEngine, together: VectorizedDriver | None = None, session: Any = None) -> None:
        """Training is about to start.

        Args:
            engine: Trains the clients.
            together: Lets them train side by side. None: each alone.
            session: What the aggregator's ``open`` returned.
        """
        last, self._last = self._last, None
        goes_on = last is not None and last.engine_module is self.module and internals.current_round(self.trainer) > 0
        if last is not None and goes_on:
            self.state, self.store, self.history = last.state, last.store, last.history
            for index in range(len(self.settings.algorithm.phases())):
                self.store.drop_entry(optimizer_entry(index))
        if self.settings.hides_clients and not self.state.transforms:
            self._notices.new_ledger(self.module)
        self.engine = engine
        self.session = session
        self.engine_module = self.module
        check_algorithm(self.settings.algorithm, self.trainer)
        self.settings.algorithm.check_optimizers(engine.optimizers.optimizers)
        self._metric_states = metrics.MetricStates(self.module, self.group.rank)
        self.has_started = True
        self.together = together
        if together is not None:
            self._plan(internals.current_round(self.trainer))
        self.set_length()

    def plan_round(self) -> None:
        """A new round comes: its cohort is drawn, and the loops learn how many batches it has on this rank."""
        index = internals.current_round(self.trainer)
        if self.plan.round != index:
            self._plan(index)
        self.set_length()

    def set_length(self) -> None:
        """Tells the loops the length of the planned round."""
        internals.set_round_length(self.trainer, self.plan.num_batches, UNKNOWN_LENGTH)

    def transform_grads(self, optimizer: Optimizer) -> None:
        """The gradients of a step are there, unscaled and not yet clipped."""
        if self.round is not None:
            self.round.transform_grads(optimizer)

    def after_batch(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """A batch has been trained, or this rank has none in this round."""
        if self.plan.is_empty(batch_idx):
            self._close_round()
            return
        place = self.plan.locate(batch_idx)
        unit = self.plan.units[place.client]
        if len(unit) > 1:
            assert self.together is not None
            self._logged.after_batch(internals.train_results(self.trainer), self.together.num_examples_of_step)
            if place.ends_client:
                self._finish_together(unit)
        else:
            self._count(outputs, batch, place)
            if place.ends_client:
                self._finish_phase(place.client)
        if place.ends_round:
            self._close_round()

    def settle(self) -> None:
        """The hooks after the round's last batch have run."""
        is_new, self._is_unsettled = self._is_unsettled, False
        if is_new:
            assert self.engine is not None
            self._agreement.settle(self.plan.round, self.engine.tensors.all, bool(self.plan.clients))

    def after_round(self) -> None:
        """The epoch ends; validation has seen the global model."""
        if self.round is not None:
            raise MisconfigurationException(
                f"Round {self.plan.round} ended before its last batch. `on_train_batch_start` must not return -1 in a "
                "federation; use limit_train_batches or local_steps to train less."
            )
        if self._has_late_values:
            late = Message(metrics.plain(metrics.late_entries(internals.train_results(self.trainer))))
            told = self._agreement.gather(self.plan.round, late, "late metrics")
            self._publish(metrics.merge_entries(told))

    def agree_to_stop(self) -> None:
        """The epoch has ended: if one rank's hooks have asked to stop since the round's end, all ranks stop."""
        self._agreement.stop(self.plan.round)

    def interrupt(self) -> None:
        """An exception ends the fit: what the round has done so far is dropped."""
        self._reading.leave()
        self.in_local_phase = False
        if self.together is not None:
            self.together.unit = ()
        if self.round is not None:
            self.round.abandon()
            self.round = None
            internals.set_global_step(self.trainer, self._first_step)
            internals.resume_by_step(self._paused)
            self.interrupted_loops = self._loops_before

    def stop(self) -> None:
        """The fit is over."""
        if self.engine is not None:
            self.engine.optimizers.close()
            self.engine = None

    # ---- checkpoints

    def resume(self, state: FederationState, history: list[dict[str, Any]]) -> None:
        """Goes on from a checkpoint."""
        self.state, self.history = state, history

    def defer_checkpoint(self, path: str, weights_only: bool) -> None:
        """Notes a checkpoint that is asked for inside the round, to be written at its end."""
        self._notices.deferred_checkpoint()
        self._deferred[path] = weights_only

    def forget_deferred(self, path: str) -> bool:
        """Drops a noted checkpoint; tells whether there was one."""
        return self._deferred.pop(path, None) is not None

    @property
    def plan(self) -> RoundPlan:
        """What this rank does in the round at hand, or the next one."""
        return self.planned.plan

    def largest_num_batches(self) -> int | float:
        """Batches of the client with the most in a round, rounded up to whole optimizer steps."""
        return self.planner.largest_num_batches(self.work)

    def _plan(self, index: int) -> None:
        self.work = replace(self.work, accumulate=self.trainer.accumulate_grad_batches)
        self.planned = self.planner.plan(index, self.work, self.together)

    def _open_round(self) -> None:
        assert self.engine is not None
        index = internals.current_round(self.trainer)
        if self.plan.round != index or self.work.accumulate != self.trainer.accumulate_grad_batches:
            self._plan(index)
            self.set_length()
        self._loops_before = internals.loops_before_round(self.trainer)
        self.in_local_phase = True
        self.schedules = check_schedules(internals.client_schedules(self.trainer), self.settings, self.work)
        self.round = Round(
            self.settings,
            self.state,
            self.engine,
            self.store,
            self.group,
            self.plan.round,
            self.plan.cohort,
            [schedule for _, schedule in self.schedules],
            self.session,
        )
        self.state = replace(self.state, transforms=list(self.round.transform_states))
        results = internals.train_results(self.trainer)
        for key in self._placeholders:
            results.pop(key, None)
        self._placeholders = []
        self._logged = metrics.LoggedValues()
        self._metric_states.mark()
        self._first_step = internals.global_step(self.trainer)
        self._first_logger_step = internals.logger_steps(self.trainer)
        self._more_logger_steps = 0
        self._first_batch: str | None = None
        self._is_alone = self.group.size == 1 and len(self.population) == 1
        self._paused = internals.pause_by_step(self.trainer, averages=not self._is_alone)
        self._call("on_round_start", self.plan.round, self.plan.cohort)

    def _open_together(self, index: int, load: LoadTogether) -> Iterator[Any] | None:
        assert self.together is not None
        unit, together, passes = self.plan.units[index], self.together, {}
        for client in unit:
            try:
                passes[client] = load(client, partial(self._reading.prepare_together, self.plan.round, client))
            except Exception as error:
                self._fail_client(client, error)
                continue
            lengths = map(self.plan.own_length, unit)
            if len(passes) == 1 and len(parts := together.affordable(unit, passes[client], lengths)) > 1:
                return self._split(index, parts)
        works = together.signatures(passes)
        if (parts := together.split(works)) != [list(unit)]:
            return self._split(index, parts)
        ticks = together.ticks([*works.values()])
        batches = together.stacked([*passes.values()], ticks)
        try:
            first = next(batches)
        except NotStackable:
            return self._split(index, [[client] for client in unit])
        try:
            self._start_together(unit, first)
        except (NotStackable, NotVectorizable) as error:
            self._train_alone(index, str(error))
            return None
        if ticks is not None and together.look_at([*passes.values()], [*works.values()]):
            return self._split(index, together.split(works))
        self.plan.set_num_steps(index, None if ticks is None else len(ticks))
        self.set_length()
        return chain([first], batches)

    def _start_together(self, unit: Sequence[ClientId], batch: Any) -> None:
        assert self.round is not None
        assert self.together is not None
        self._snapshot = self._metric_states.snapshot()
        internals.set_global_step(self.trainer, self._first_step)
        self._reading.enter(self.plan.round, unit[0])
        self.round.start_clients(unit)
        self.together.start(self.round, unit, batch)

    def _finish_together(self, unit: Sequence[ClientId]) -> None:
        assert self.round is not None
        assert self.together is not None
        examples = [self.planned.num_examples[client] or 0 for client in unit]
        more_steps, taken = self.round.finish_clients(examples, *self.together.finish())
        corrected = None
        if not all(taken):
            self._metric_states.restore(self._snapshot)
            corrected = self.together.only(taken)
        self._logged.after_client(internals.train_results(self.trainer), any(taken), corrected)
        self._more_logger_steps += more_steps
        self._reading.leave()

    def _split(self, index: int, parts: Sequence[Sequence[ClientId]]) -> Iterator[Any] | None:
        assert self.together is not None
        self.together.leave()
        self._reading.leave()
        self.plan.split(index, parts)
        self.set_length()
        return None

    def _train_alone(self, index: int, reason: str) -> None:
        assert self.together is not None
        self._reading.leave()
        self.together.refuse(reason)
        self.together = None
        self.plan.separate(index)
        self.set_length()

    def _open_client(self, client: ClientId, loader: Loader) -> Loader:
        assert self.round is not None
        self._snapshot = self._before_phase = self._metric_states.snapshot()
        self._examples_seen = self._examples_of_loss = 0
        self._examples_of_pass: int | None = None
        self._pass_length = self.work.pass_length(count_batches(loader))
        self._loss: float | Tensor = 0.0
        internals.set_global_step(self.trainer, self._first_step)
        index, kind = self.plan.round, self.settings.algorithm.probe
        loader = self._reading.prepare(index, client, loader)
        self.round.start_client(client, self._reading.make_probe(kind, index, client, loader, self.work))
        self._call("on_client_start", client)
        return loader

    def _fail_client(self, client: ClientId, error: Exception) -> None:
        self.planned.failed[client] = self._failure(client, error)
        if self.round is not None and self.round.drop_client():
            self._logged.after_client(internals.train_results(self.trainer), accepted=False)
            self._metric_states.restore(self._snapshot)
            self._reading.leave()

    def _failure(self, client: ClientId, error: Exception) -> str:
        if self.on_client_error == "raise":
            raise_error(client, error)
        return f"{type(error).__name__}: {error.with_traceback(None)}"  # whose frames hold the loader's workers

    def _count(self, outputs: Any, batch: Any, place: BatchPosition) -> None:
        results = internals.train_results(self.trainer)
        num_examples = logged.batch_size(results, batch)
        self._examples_seen += num_examples
        if place.offset + 1 == self._pass_length:
            self._examples_of_pass = self._examples_seen
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if self._phase_counts:
            self._examples_of_loss += num_examples
        if isinstance(loss, Tensor) and self._phase_counts:
            self._loss = self._loss + loss.detach().double() * (num_examples * self.work.accumulate)
        if self._first_batch is None:
            tells = self.population.silos and not self.history and not self.settings.hides_clients
            self._first_batch = digest(batch) if tells else ""
        self._logged.after_batch(results, num_examples)

    @property
    def _phase_counts(self) -> bool:
        """Whether what is logged in the phase at hand is about the model that is sent."""
        assert self.round is not None
        return self.round.phase.model == "global"

    def _finish_phase(self, index: int) -> None:
        assert self.round is not None
        units, counts = self.plan.units, self._phase_counts
        self._logged.after_phase(internals.train_results(self.trainer), counts)
        if not counts:
            self._metric_states.restore(self._before_phase)
        if units[index : index + 2] == [units[index]] * 2:
            self._before_phase = self._metric_states.snapshot()
            self._examples_seen = 0
            self.round.next_phase()
        else:
            self._finish_client(units[index][0])

    def _finish_client(self, client: ClientId) -> None:
        assert self.round is not None
        told = self.planned.num_examples[client]
        if told is None:
            told = self._examples_of_pass if self._examples_of_pass is not None else self._examples_seen
        loss = float(self._loss) / self._examples_of_loss if self._examples_of_loss else float("nan")
        run, update = self.round.finish_client(told, loss)
        own = self._logged.after_client(internals.train_results(self.trainer), accepted=update is not None)
        if update is None:
            self._metric_states.restore(self._snapshot)
        self._call("on_client_end", client, replace(run, logged=own), update)
        self._reading.leave()

    def _close_round(self) -> None:
        assert self.round is not None
        results = internals.train_results(self.trainer)
        states, tensors = self._metric_states.report()
        entries = {**self._logged.entries, **metrics.logged_metric_entries(results)}
        own_steps = internals.logger_steps(self.trainer) - self._first_logger_step + self._more_logger_steps
        fields = {
            "metrics": metrics.plain(entries),
            "late": bool(metrics.late_entries(results)),
            "metric_states": states,
            "first_batch": self._first_batch,
            "empty": self.planned.empty,
            "failed": list(self.planned.failed.items()),
            "should_stop": self.trainer.should_stop,
            "logger_steps": own_steps if self.plan.clients else 0,
            "deferred": self._deferred,
        }
        result = self._join_ranks(Message(fields, tensors))
        self.state, self.round, self.in_local_phase = result.state, None, False
        self._is_unsettled = True
        internals.step_epoch_schedules(self.trainer)
        told = [message.fields for message in result.reports]
        num_steps = sum(fields["num_steps"] for fields in told)
        internals.set_global_step(self.trainer, self._first_step + num_steps)
        logger_steps = sum(fields["logger_steps"] for fields in told)
        internals.set_logger_steps(self.trainer, self._first_logger_step + logger_steps)
        self._metric_states.merge(result.reports, self.module.device)
        merged = metrics.merge_entries(fields["metrics"] for fields in told)
        metrics.hide_unmerged(results, merged)
        self._publish(merged)
        self._has_late_values = any(fields["late"] for fields in told)
        self.trainer.should_stop = any(fields["should_stop"] for fields in told)
        self._notices.result(self.plan.round, result, self.trainer, merged)
        self.history.append(round_entry(self.plan.round, result, self.planned.dropped))
        internals.log_to_loggers(self.trainer, figures(self.history[-1], result.hides_clients))
        self._notices.words(self.trainer, words(self.history[-1]))
        self.trainer.should_stop |= result.stop_reason is not None
        self._call("on_aggregate_end", result.aggregate)
        internals.resume_by_step(self._paused)
        if not self._is_alone:
            internals.average_passed_steps(self.trainer, self._first_step, self._first_step + num_steps)
        self._deferred = {}
        for path, weights_only in told[0]["deferred"].items():
            self.trainer.save_checkpoint(path, weights_only)
        internals.save_passed_steps(self.trainer, self._first_step, self._first_step + num_steps)

    def _join_ranks(self, report: Message) -> RoundResult:
        assert self.round is not None
        with naming_round(f"Round {self.plan.round}", "The round is dropped. "):
            return self.round.close(report, partial(self._notices.data, self.plan.round), self.loader.seconds_reading)

    def _publish(self, entries: metrics.Entries) -> None:
        results = internals.train_results(self.trainer)
        self._placeholders += metrics.publish(entries, results, self.module, self.module.device)

    def _call(self, hook: str, *args: Any) -> None:
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            method: Callable[..., None] | None = getattr(callback, hook, None)
            if method is not None:
                method(self.trainer, self.module, *args)
