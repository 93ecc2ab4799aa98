"""The rounds of a federation inside Lightning's training loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_fl.aggregation import FederationFacts
from lightning_fl.clients import (
    ClientRandomness,
    ClientStore,
    LocalWork,
    Population,
    RoundLoader,
    RoundPlan,
    cohort_size,
    count_batches,
    derive_seed,
    sample_cohort,
)
from lightning_fl.clients.loaders import Loader
from lightning_fl.clients.plan import Place
from lightning_fl.clients.round_loader import UNKNOWN_LENGTH, raise_error
from lightning_fl.clients.split import in_order
from lightning_fl.communication import Group, Message, RankLost
from lightning_fl.engines import Schedule, SequentialEngine
from lightning_fl.strategies import lightning_internals as internals
from lightning_fl.strategies import lightning_results as logged
from lightning_fl.strategies import metrics
from lightning_fl.strategies.batches import digest, generators
from lightning_fl.strategies.callback import has_hooks
from lightning_fl.strategies.hidden_report import refuse_number_of_steps
from lightning_fl.strategies.round import FederationSettings, FederationState, Round, RoundResult
from lightning_fl.tree import fingerprint
from lightning_fl.types import ClientId

HOOKS_AFTER_THE_ROUND = ("on_train_batch_end", "on_validation_end", "on_validation_epoch_end", "on_train_epoch_end")
OnClientError = Literal["raise", "skip"]


_GO_ON = "Start all ranks again with trainer.fit(..., ckpt_path='last'); they go on after the last checkpoint."


class FederatedRounds:
    """Plans each round, switches clients at their last batches, and closes the round after the last of them.

    Args:
        trainer: The Trainer.
        population: All clients.
        group: The ranks of the federation.
        settings: What does not change from round to round.
        clients_per_round: A count, a share, or None for all.
        work: How much a client trains in a round.
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
        clients_per_round: int | float | None,
        work: LocalWork,
        at_home: bool,
        on_client_error: OnClientError = "raise",
        last: FederatedRounds | None = None,
    ) -> None:
        self.trainer = trainer
        self.group = group
        self.settings = settings
        self.work = work
        self.at_home = at_home
        self.on_client_error = on_client_error
        self.clients_per_round = clients_per_round
        self.state = FederationState()
        self.store = ClientStore()
        self.history: list[dict[str, Any]] = []
        self.has_started = False
        self.in_local_phase = False
        self.interrupted_loops: dict[str, Any] | None = None
        self.round: Round | None = None
        self.engine: SequentialEngine | None = None
        self.engine_module: L.LightningModule | None = None
        self.schedules: list[tuple[Any, Schedule]] = []
        self._last = last
        self._has_late_values = False
        self._is_unsettled = False
        self._deferred: dict[str, bool] = {}
        self._placeholders: list[str] = []
        self._warned: set[object] = set()
        self._randomness = ClientRandomness()
        self.renew(population)

    def renew(self, population: Population) -> None:
        """Takes new loaders of the clients."""
        self.population = population
        self.cohort_size = cohort_size(self.clients_per_round, len(population))
        self.loader = RoundLoader(
            population.loaders,
            lambda: (self.plan, self.work),
            self._open_round,
            self._open_client,
            self.set_length,
            self._fail_client,
        )
        self._largest: int | float | None = None
        self._plan(internals.current_round(self.trainer))

    @property
    def facts(self) -> FederationFacts:
        """What everyone may know before training starts."""
        is_uniform, population = self.settings.weighting == "uniform", self.population
        max_weight = (lambda: 1.0) if is_uniform else population.max_examples
        return FederationFacts(population.silos is not None, self.cohort_size, True, max_weight)

    @property
    def module(self) -> L.LightningModule:
        """The user's module."""
        return self.trainer.lightning_module

    # ---- hooks of Lightning, in the order in which they come

    def start(self, engine: SequentialEngine) -> None:
        """Training is about to start."""
        last, self._last = self._last, None
        goes_on = last is not None and last.engine_module is self.module and internals.current_round(self.trainer) > 0
        if last is not None and goes_on:
            self.state, self.store, self.history = last.state, last.store, last.history
            self.store.drop_entry("optimizer")
        self.engine = engine
        self.engine_module = self.module
        self.settings.algorithm.check_optimizers(engine.optimizers.optimizers)
        self._metric_states = metrics.MetricStates(self.module, self.group.rank)
        self.has_started = True
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
        self._count(outputs, batch, place)
        if place.ends_client:
            self._finish_client(self.plan.clients[place.client])
        if place.ends_round:
            self._close_round()

    def settle(self) -> None:
        """The users' hooks after the round's last batch have run; what they made of the global model goes to all ranks.

        A rank without clients has no batch, and so none of these hooks.
        """
        is_new, self._is_unsettled = self._is_unsettled, False
        if not is_new or self.group.size == 1 or not has_hooks(self.trainer, "on_train_batch_end"):
            return
        assert self.engine is not None
        own = {name: fingerprint(tensor) for name, tensor in self.engine.tensors.all.items()}
        message = Message({"own": own, "trained": bool(self.plan.clients)})
        told = self._gather(message, "after the last batch")
        source = next((rank for rank, fields in enumerate(told) if fields["trained"]), 0)
        with torch.no_grad():
            for name, tensor in self.engine.tensors.all.items():
                if any(fields["own"][name] != told[0]["own"][name] for fields in told):
                    tensor.copy_(self.group.broadcast(tensor, source))

    def after_round(self) -> None:
        """The epoch ends; validation has seen the global model."""
        if self.round is not None:
            raise MisconfigurationException(
                f"Round {self.plan.round} ended before its last batch. `on_train_batch_start` must not return -1 in a "
                "federation; use limit_train_batches or local_steps to train less."
            )
        if self._has_late_values:
            results = internals.train_results(self.trainer)
            late = Message(metrics.plain(metrics.late_entries(results)))
            told = self._gather(late, "late metrics")
            self._publish(metrics.merge_entries(told))

    def agree_to_stop(self) -> None:
        """The epoch has ended: if one rank's hooks have asked to stop since the round's end, all ranks stop."""
        if self.group.size == 1 or not has_hooks(self.trainer, *HOOKS_AFTER_THE_ROUND):
            return
        told = self._gather(Message({"should_stop": self.trainer.should_stop}), "after the hooks")
        self.trainer.should_stop = any(fields["should_stop"] for fields in told)

    def interrupt(self) -> None:
        """An exception ends the fit: what the round has done so far is dropped."""
        self._randomness.exit()
        self.in_local_phase = False
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
        if self._warn_once("deferred"):
            rank_zero_warn("A checkpoint asked for inside a round is written at its end, when there is a global model.")
        self._deferred[path] = weights_only

    def forget_deferred(self, path: str) -> bool:
        """Drops a noted checkpoint; tells whether there was one."""
        return self._deferred.pop(path, None) is not None

    # ---- a round

    def largest_num_batches(self) -> int | float:
        """Batches of the client with the most in a round, rounded up to whole optimizer steps."""
        if self._largest is None:
            self._check_steps("trainer.estimated_stepping_batches")
            loaders = self.population.loaders
            clients = [next(iter(loaders))] if self.work.steps is not None else loaders
            steps = [self.work.num_steps(count_batches(loaders[client])) for client in clients]
            own = float("inf") if None in steps else float(max(step for step in steps if step is not None))
            told = self.group.all_gather(Message({"steps": own}), "estimated steps")
            largest = max(float(message.fields["steps"]) for message in told)
            self._largest = largest if largest == float("inf") else max(int(largest), 1) * self.work.accumulate
        return self._largest

    def _check_steps(self, what: str) -> None:
        if self.settings.aggregator.hides_reports and self.population.silos is not None and self.work.steps is None:
            refuse_number_of_steps(what)

    def _plan(self, index: int) -> None:
        population = self.population
        self.work = replace(self.work, accumulate=self.trainer.accumulate_grad_batches)
        cohort = sample_cohort(population.ids, self.cohort_size, self.settings.seed, index)
        clients, segments = [], []
        self._num_examples: dict[ClientId, int | None] = {}
        self._empty: list[ClientId] = []
        self._failed: dict[ClientId, str] = {}
        for client in population.place(cohort, self.group.size, self.at_home)[self.group.rank]:
            try:
                loader = population.loaders[client]
                own = self.work.segments(count_batches(loader))
            except Exception as error:
                self._fail_client(client, error)
                continue
            if not own:
                self._empty.append(client)
                continue
            clients.append(client)
            segments.append(own)
            self._num_examples[client] = population.num_examples(client, loader)
        self.plan = RoundPlan(index, cohort, clients, segments, self.work.accumulate)

    def _open_round(self) -> None:
        assert self.engine is not None
        index = internals.current_round(self.trainer)
        if self.plan.round != index or self.work.accumulate != self.trainer.accumulate_grad_batches:
            self._plan(index)
            self.set_length()
        self._loops_before = internals.loops_before_round(self.trainer)
        self.in_local_phase = True
        self.schedules = internals.client_schedules(self.trainer)
        if self.schedules:
            self._check_steps("A schedule that steps inside local training")
        self.round = Round(
            self.settings,
            self.state,
            self.engine,
            self.store,
            self.group,
            self.plan.round,
            self.plan.cohort,
            [schedule for _, schedule in self.schedules],
        )
        results = internals.train_results(self.trainer)
        for key in self._placeholders:
            results.pop(key, None)
        self._placeholders = []
        self._logged = metrics.LoggedValues()
        self._metric_states.mark()
        self._first_step = internals.global_step(self.trainer)
        self._first_logger_step = internals.logger_steps(self.trainer)
        self._first_batch: str | None = None
        self._is_alone = self.group.size == 1 and len(self.population) == 1
        self._paused = internals.pause_by_step(self.trainer, averages=not self._is_alone)
        self._call("on_round_start", self.plan.round, self.plan.cohort)

    def _open_client(self, client: ClientId, loader: Loader) -> Loader:
        assert self.round is not None
        self._snapshot = self._metric_states.snapshot()
        self._examples_seen = 0
        self._examples_of_pass: int | None = None
        self._pass_length = self.work.pass_length(count_batches(loader))
        self._loss: float | Tensor = 0.0
        internals.set_global_step(self.trainer, self._first_step)
        self._randomness.enter(self.settings.seed, self.plan.round, client)
        self.round.start_client(client)
        self._call("on_client_start", client)
        if getattr(loader, "persistent_workers", False) and self._warn_once("persistent workers"):
            rank_zero_warn(
                "A client's loader has persistent_workers=True: their random numbers are not those of the round and "
                "client, so runs may not repeat. Leave it out."
            )
        if self.trainer.overfit_batches > 0:  # type: ignore[attr-defined]
            loader = in_order(loader)
        seed = derive_seed(self.settings.seed, self.plan.round, "loader", client)
        for generator in generators(loader):
            self._randomness.seed_generator(generator, seed)
        return loader

    def _fail_client(self, client: ClientId, error: Exception) -> None:
        if self.on_client_error == "raise":
            raise_error(client, error)
        self._failed[client] = f"{type(error).__name__}: {error}"
        if self.round is not None and self.round.drop_client():
            self._logged.after_client(internals.train_results(self.trainer), accepted=False)
            self._metric_states.restore(self._snapshot)
            self._randomness.exit()

    def _count(self, outputs: Any, batch: Any, place: Place) -> None:
        results = internals.train_results(self.trainer)
        num_examples = logged.batch_size(results, batch)
        self._examples_seen += num_examples
        if place.offset + 1 == self._pass_length:
            self._examples_of_pass = self._examples_seen
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor):
            self._loss = self._loss + loss.detach().double() * (num_examples * self.work.accumulate)
        if self._first_batch is None:
            self._first_batch = digest(batch) if self.population.silos and not self.history else ""
        self._logged.after_batch(results, num_examples)

    def _finish_client(self, client: ClientId) -> None:
        assert self.round is not None
        told = self._num_examples[client]
        if told is None:
            told = self._examples_of_pass if self._examples_of_pass is not None else self._examples_seen
        loss = float(self._loss) / self._examples_seen if self._examples_seen else float("nan")
        run, update = self.round.finish_client(told, loss)
        self._logged.after_client(internals.train_results(self.trainer), accepted=update is not None)
        if update is None:
            self._metric_states.restore(self._snapshot)
        self._call("on_client_end", client, run, update)
        self._randomness.exit()

    def _close_round(self) -> None:
        assert self.round is not None
        results = internals.train_results(self.trainer)
        states, tensors = self._metric_states.report()
        entries = {**self._logged.entries, **metrics.logged_metric_entries(results)}
        fields = {
            "metrics": metrics.plain(entries),
            "late": bool(metrics.late_entries(results)),
            "metric_states": states,
            "first_batch": self._first_batch,
            "empty": self._empty,
            "failed": list(self._failed.items()),
            "should_stop": self.trainer.should_stop,
            "logger_steps": internals.logger_steps(self.trainer) - self._first_logger_step if self.plan.clients else 0,
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
        self._warn_of_refused(result.refused)
        self.history.append(
            {
                "round": self.plan.round,
                "num_clients": result.aggregate.num_clients,
                "num_examples": sum(fields["num_examples"] for fields in told),
                "num_steps": num_steps,
                "refused": result.refused,
                "lost": result.lost,
                "failed": [client for fields in told for client, _ in fields["failed"]],
                "empty": [client for fields in told for client in fields["empty"]],
                "update_norm": result.norm,
                "update_spread": result.spread,
                "num_bytes": result.num_bytes,
                "seconds": result.seconds,
            }
        )
        internals.log_to_loggers(self.trainer, _figures(self.history[-1]))
        self._call("on_aggregate_end", result.aggregate)
        internals.resume_by_step(self._paused)
        if not self._is_alone:
            internals.average_passed_steps(self.trainer, self._first_step, self._first_step + num_steps)
        self._deferred = {}
        for path, weights_only in told[0]["deferred"].items():
            self.trainer.save_checkpoint(path, weights_only)
        internals.save_passed_steps(self.trainer, self._first_step, self._first_step + num_steps)

    def _gather(self, message: Message, topic: str) -> list[dict[str, Any]]:
        try:
            return [told.fields for told in self.group.all_gather(message, topic)]
        except RankLost as error:
            raise RankLost(f"After round {self.plan.round}: {error} {_GO_ON}") from error

    def _join_ranks(self, report: Message) -> RoundResult:
        assert self.round is not None
        try:
            return self.round.close(report, self._warn_of_data)
        except RankLost as error:
            raise RankLost(f"Round {self.plan.round}: {error} The round is dropped. {_GO_ON}") from error

    def _publish(self, entries: metrics.Entries) -> None:
        results = internals.train_results(self.trainer)
        self._placeholders += metrics.publish(entries, results, self.module, self.module.device)

    def _call(self, hook: str, *args: Any) -> None:
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            method: Callable[..., None] | None = getattr(callback, hook, None)
            if method is not None:
                method(self.trainer, self.module, *args)

    # ---- warnings

    def _warn_once(self, about: object) -> bool:
        is_new = about not in self._warned
        self._warned.add(about)
        return is_new

    def _warn_of_data(self, reports: list[Message]) -> None:
        for client in (client for message in reports for client in message.fields["empty"]):
            if self._warn_once(("empty", client)):
                rank_zero_warn(
                    f"Client {client!r} has no data: its loader yields no batch, so it takes no part. Leave it out, "
                    "give it data, or check `drop_last` and the batch size."
                )
        for client, error in (pair for message in reports for pair in message.fields["failed"]):
            rank_zero_warn(
                f"Round {self.plan.round}: the loader of client {client!r} raised {error}, so it was left out."
            )
        first = [message.fields["first_batch"] for message in reports]
        if first[0] and len(first) > 1 and len(set(first)) == 1:
            rank_zero_warn(
                f"All {len(first)} ranks trained on the same first batch. Started by a launcher, each rank is a silo "
                "with its own data. To split one data set among simulated clients, give num_clients or partition."
            )

    def _warn_of_refused(self, refused: list[ClientId]) -> None:
        if refused:
            rank_zero_warn(
                f"Round {self.plan.round}: the updates of {', '.join(map(repr, refused))} hold NaN or Inf and were "
                "left out. Lower the learning rate, clip gradients, or look at these clients' data."
            )


def _figures(entry: dict[str, Any]) -> dict[str, float]:
    names = ("num_clients", "num_examples", "num_steps", "update_norm", "update_spread", "num_bytes")
    seconds = {f"fl/seconds_{phase}": value for phase, value in entry["seconds"].items()}
    return {"fl/round": entry["round"], **{f"fl/{name}": entry[name] for name in names}, **seconds}
