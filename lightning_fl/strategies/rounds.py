"""The rounds of a federation inside Lightning's training loop."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_fl.clients import (
    ClientRandomness,
    LocalWork,
    ClientStore,
    Population,
    RoundLoader,
    RoundPlan,
    cohort_size,
    count_batches,
    derive_seed,
    sample_cohort,
)
from lightning_fl.clients.loaders import Loader
from lightning_fl.clients.round_loader import UNKNOWN_LENGTH
from lightning_fl.clients.split import in_order
from lightning_fl.communication import Group, Message
from lightning_fl.engines import SequentialEngine
from lightning_fl.strategies import lightning_internals as internals
from lightning_fl.strategies import metrics
from lightning_fl.strategies.round import FederationSettings, FederationState, Round, RoundResult
from lightning_fl.types import ClientId


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
        last: FederatedRounds | None = None,
    ) -> None:
        self.trainer = trainer
        self.group = group
        self.settings = settings
        self.work = work
        self.at_home = at_home
        self.clients_per_round = clients_per_round
        self._last = last
        self.state = FederationState()
        self.store = ClientStore()
        self.history: list[dict[str, Any]] = []
        self.in_local_phase = False
        self.round: Round | None = None
        self.engine: SequentialEngine | None = None
        self._randomness = ClientRandomness()
        self.interrupted_loops: dict[str, Any] | None = None
        self._has_late_values = False
        self._deferred: dict[str, bool] = {}
        self._placeholders: list[str] = []
        self._skipped: set[ClientId] = set()
        self.renew(population)

    def renew(self, population: Population) -> None:
        """Takes new loaders of the clients."""
        self.population = population
        self.cohort_size = cohort_size(self.clients_per_round, len(population))
        self.loader = RoundLoader(population.loaders, lambda: self.plan, self.work, self._open_round, self._prepare)
        self.plan = self._plan(internals.current_round(self.trainer))

    @property
    def module(self) -> L.LightningModule:
        """The user's module."""
        return self.trainer.lightning_module

    # ---- hooks of Lightning, in the order in which they come

    def start(self, engine: SequentialEngine) -> None:
        """Training is about to start."""
        if self._last is not None and internals.current_round(self.trainer) > 0:
            self.state, self.store, self.history = self._last.state, self._last.store, self._last.history
        self._last = None
        self.engine = engine
        self._metric_states = metrics.MetricStates(self.module)

    def plan_round(self) -> None:
        """A new round comes: its cohort is drawn, and the loops learn how many batches it has on this rank."""
        self.plan = self._plan(internals.current_round(self.trainer))
        self._loops_before = internals.loops_before_round(self.trainer)
        self.set_length()

    def set_length(self) -> None:
        """Tells the loops the length of the planned round."""
        internals.set_round_length(self.trainer, self.plan.num_batches, UNKNOWN_LENGTH)

    def transform_grads(self) -> None:
        """The gradients of a step are there, unscaled and not yet clipped."""
        if self.round is not None:
            self.round.transform_grads()

    def after_batch(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """A batch has been trained."""
        assert self.round is not None
        if not self.plan.clients:
            self._close_round()
            return
        self._count(outputs, batch)
        if self.plan.num_batches is not None and self.trainer.num_training_batches != self.plan.num_batches:
            self.set_length()
        place = self.plan.locate(batch_idx)
        if place.ends_client:
            self._finish_client(self.plan.clients[place.client])
            if place.ends_round:
                self._close_round()
            else:
                self._start_client(self.plan.clients[place.client + 1])

    def after_round(self) -> None:
        """The epoch ends; validation has seen the global model."""
        if self.round is not None:
            raise MisconfigurationException(
                f"Round {self.plan.round} ended before its last batch. `on_train_batch_start` must not return -1 in a "
                "federation; use limit_train_batches or local_steps to train less."
            )
        if self._has_late_values:
            results = internals.train_results(self.trainer)
            late = metrics.plain(metrics.late_entries(results))
            told = [message.fields for message in self.group.all_gather(Message(late))]
            self._publish(metrics.merge_entries(told))

    def interrupt(self) -> None:
        """An exception ends the fit: what the round has done so far is dropped."""
        self._randomness.exit()
        self.in_local_phase = False
        if self.round is not None:
            self.round.abandon()
            self.round = None
            internals.set_global_step(self.trainer, self._first_step)
            internals.resume_step_checkpoints(self._paused)
            self.interrupted_loops = self._loops_before

    def resume(self, state: FederationState, history: list[dict[str, Any]]) -> None:
        """Goes on from a checkpoint."""
        self.state, self.history = state, history

    def defer_checkpoint(self, path: str, weights_only: bool) -> None:
        """Notes a checkpoint that is asked for inside the round, to be written at its end."""
        if not self._deferred:
            rank_zero_warn("A checkpoint asked for inside a round is written at its end, when there is a global model.")
        self._deferred[path] = weights_only

    def forget_deferred(self, path: str) -> bool:
        """Drops a noted checkpoint; tells whether there was one."""
        return self._deferred.pop(path, None) is not None

    def stop(self) -> None:
        """The fit is over."""
        if self.engine is not None:
            self.engine.optimizers.close()
            self.engine = None

    # ---- a round

    def largest_num_batches(self) -> int | float:
        """Batches of the client with the most in a round, rounded up to whole optimizer steps."""
        loaders = self.population.loaders
        steps = [self.work.num_steps(count_batches(loader)) for loader in _distinct(loaders, self.work)]
        own = float("inf") if None in steps else float(max(step for step in steps if step is not None))
        largest = max(float(message.fields["steps"]) for message in self.group.all_gather(Message({"steps": own})))
        return largest if largest == float("inf") else int(largest) * self.work.accumulate

    def _plan(self, index: int) -> RoundPlan:
        population = self.population
        cohort = sample_cohort(population.ids, self.cohort_size, self.settings.seed, index)
        clients, segments = [], []
        self._num_examples: dict[ClientId, int | None] = {}
        for client in population.place(cohort, self.group.size, self.at_home)[self.group.rank]:
            loader = population.loaders[client]
            own = self.work.segments(count_batches(loader))
            if not own:
                self._warn_empty(client)
                continue
            clients.append(client)
            segments.append(own)
            self._num_examples[client] = population.num_examples(client, loader)
        return RoundPlan(index, cohort, clients, segments, self.work.accumulate)

    def _open_round(self) -> None:
        assert self.engine is not None
        self.in_local_phase = True
        self.round = Round(
            self.settings, self.state, self.engine, self.store, self.group, self.plan.round, self.plan.cohort
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
        self._paused = internals.pause_step_checkpoints(self.trainer)
        self._call("on_round_start", self.plan.round, self.plan.cohort)
        if self.plan.clients:
            self._start_client(self.plan.clients[0])

    def _start_client(self, client: ClientId) -> None:
        assert self.round is not None
        self._snapshot = self._metric_states.snapshot()
        self._examples_seen = 0
        self._loss: float | Tensor = 0.0
        internals.set_global_step(self.trainer, self._first_step)
        self._randomness.enter(self.settings.seed, self.plan.round, client)
        self.round.start_client(client)
        self._call("on_client_start", client)

    def _prepare(self, client: ClientId, loader: Loader) -> Loader:
        if self.trainer.overfit_batches > 0:  # type: ignore[attr-defined]
            loader = in_order(loader)
        seed = derive_seed(self.settings.seed, self.plan.round, "loader", client)
        for generator in _generators(loader):
            self._randomness.seed_generator(generator, seed)
        return loader

    def _count(self, outputs: Any, batch: Any) -> None:
        num_examples = _batch_size(batch)
        self._examples_seen += num_examples
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor):
            self._loss = self._loss + loss.detach().double() * (num_examples * self.work.accumulate)
        if self._first_batch is None:
            self._first_batch = _digest(batch) if self.population.silos and not self.history else ""
        self._logged.after_batch(internals.train_results(self.trainer), num_examples)

    def _finish_client(self, client: ClientId) -> None:
        assert self.round is not None
        told = self._num_examples[client]
        loss = float(self._loss) / self._examples_seen if self._examples_seen else float("nan")
        run, update = self.round.finish_client(self._examples_seen if told is None else told, loss)
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
            "should_stop": self.trainer.should_stop,
            "logger_steps": internals.logger_steps(self.trainer) - self._first_logger_step,
            "deferred": self._deferred,
        }
        result = self.round.close(Message(fields, tensors))
        self.state, self.round, self.in_local_phase = result.state, None, False
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
        self._warn_of(result)
        self.history.append(
            {
                "round": self.plan.round,
                "num_clients": result.aggregate.num_clients,
                "num_examples": sum(fields["num_examples"] for fields in told),
                "num_steps": num_steps,
                "refused": result.refused,
                "seconds": result.seconds,
            }
        )
        self._call("on_aggregate_end", result.aggregate)
        self._write_checkpoints(told[0]["deferred"], num_steps)

    def _write_checkpoints(self, deferred: dict[str, bool], num_steps: int) -> None:
        internals.resume_step_checkpoints(self._paused)
        self._deferred = {}
        for path, weights_only in deferred.items():
            self.trainer.save_checkpoint(path, weights_only)
        internals.save_passed_steps(self.trainer, self._first_step, self._first_step + num_steps)

    def _publish(self, entries: metrics.Entries) -> None:
        results = internals.train_results(self.trainer)
        self._placeholders += metrics.publish(entries, results, self.module, self.module.device)

    def _call(self, hook: str, *args: Any) -> None:
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            method: Callable[..., None] | None = getattr(callback, hook, None)
            if method is not None:
                method(self.trainer, self.module, *args)

    # ---- warnings

    def _warn_empty(self, client: ClientId) -> None:
        if client not in self._skipped:
            self._skipped.add(client)
            rank_zero_warn(
                f"Client {client!r} has no data: its loader yields no batch, so it takes no part. Leave it out, give "
                "it data, or check `drop_last` and the batch size."
            )

    def _warn_of(self, result: RoundResult) -> None:
        if result.refused:
            rank_zero_warn(
                f"Round {self.plan.round}: the updates of {', '.join(map(repr, result.refused))} hold NaN or Inf and "
                "were left out. Lower the learning rate, clip gradients, or look at these clients' data."
            )
        first = [message.fields["first_batch"] for message in result.reports]
        if first[0] and len(first) > 1 and len(set(first)) == 1:
            rank_zero_warn(
                f"All {len(first)} ranks trained on the same first batch. Started by a launcher, each rank is a silo "
                "with its own data. To split one data set among simulated clients, give num_clients or partition."
            )


def _distinct(loaders: Any, work: LocalWork) -> Any:
    clients = list(loaders)[:1] if work.steps is not None else loaders
    return (loaders[client] for client in clients)


def _generators(loader: Any) -> list[torch.Generator]:
    samplers = [getattr(loader, "sampler", None), getattr(getattr(loader, "batch_sampler", None), "sampler", None)]
    found = [getattr(holder, "generator", None) for holder in (loader, *samplers)]
    return list({id(generator): generator for generator in found if isinstance(generator, torch.Generator)}.values())


def _batch_size(batch: Any) -> int:
    for leaf in tree_leaves(batch):
        if isinstance(leaf, Tensor):
            return leaf.size(0) if leaf.dim() else 1
    return 1


def _digest(batch: Any) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for leaf in tree_leaves(batch):
        content = leaf.detach().cpu().contiguous().view(torch.uint8).numpy() if isinstance(leaf, Tensor) else leaf
        digest.update(content.tobytes() if hasattr(content, "tobytes") else repr(content).encode())
    return digest.hexdigest()
