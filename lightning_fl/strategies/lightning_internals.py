"""Every touch of Lightning's private parts, in one place. Holds for lightning >= 2.6, < 2.7.

Each function and class says why it is needed; ``tests/strategies/test_lightning_internals.py`` fails when what it
relies on has changed.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.core.optimizer import _MockOptimizer
from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.optimization.automatic import _AutomaticOptimization
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.pytorch.trainer.connectors.logger_connector.result import (
    _Metadata,
    _ResultCollection,
    _ResultMetric,
    _Sync,
)
from lightning.pytorch.utilities.types import LRSchedulerConfig

SubprocessLauncher = _SubprocessScriptLauncher
ResultCollection = _ResultCollection


class RoundEpochLoop(_TrainingEpochLoop):
    """Lightning's epoch loop, in which an epoch is a round of several clients.

    - ``done``: ``max_steps`` and ``should_stop`` count at the round's end only, where all ranks decide together.
    - accumulation windows and the frequency of step schedules are counted within a client.
    """

    @property
    def _plan(self) -> Any:
        return self.trainer.strategy.plan  # type: ignore[attr-defined]

    @property
    def _is_training_done(self) -> bool:
        return self._num_ready_batches_reached()

    @property
    def done(self) -> bool:
        return self._is_training_done and self._is_validation_done

    def _accumulated_batches_reached(self) -> bool:
        plan = self._plan
        if plan is None or not plan.clients:
            return True
        return plan.locate(self.batch_progress.current.ready - 1).ends_window

    def update_lr_schedulers(self, interval: str, update_plateau_schedulers: bool) -> None:
        plan = self._plan
        if interval == "epoch" or plan is None or plan.clients:
            with warnings.catch_warnings():
                # a rank without clients steps its epoch schedules though its optimizers have not stepped
                warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
                super().update_lr_schedulers(interval, update_plateau_schedulers)

    def _update_learning_rates(self, interval: str, update_plateau_schedulers: bool) -> None:
        if interval == "epoch":
            super()._update_learning_rates(interval, update_plateau_schedulers)
            return
        current = self.batch_progress.current
        ready, current.ready = current.ready, self._plan.locate(current.ready - 1).offset + 1
        try:
            super()._update_learning_rates(interval, update_plateau_schedulers)
        finally:
            current.ready = ready

    def set_global_step(self, step: int) -> None:
        """Sets ``trainer.global_step``, which Lightning counts per process, so that all ranks agree."""
        for total in (
            self.automatic_optimization.optim_progress.optimizer.step.total,
            self.manual_optimization.optim_step_progress.total,
        ):
            total.ready = total.completed = step


class RoundOptimization(_AutomaticOptimization):
    """Automatic optimization that empties the gradients at the start of a client's accumulation window."""

    def _make_zero_grad_fn(self, batch_idx: int, optimizer: torch.optim.Optimizer) -> Callable[[], None] | None:
        place = self.trainer.strategy.plan.locate(batch_idx)  # type: ignore[attr-defined]
        window_idx = 0 if place.starts_window else 1
        return super()._make_zero_grad_fn(window_idx if self.trainer.accumulate_grad_batches > 1 else 0, optimizer)


class RoundFitLoop(_FitLoop):
    """Lightning's fit loop, whose number of batches an LR schedule may ask for before the first round.

    ``trainer.estimated_stepping_batches`` multiplies ``max_batches`` by the epochs; while the optimizers are
    configured it must see the largest client, not the sum over a rank's clients.
    """

    @property
    def max_batches(self) -> int | float:
        largest = getattr(self.trainer.strategy, "largest_num_batches", None)
        return self.__dict__["max_batches"] if largest is None else largest()

    @max_batches.setter
    def max_batches(self, value: int | float) -> None:
        self.__dict__["max_batches"] = value

    def setup_data(self) -> None:
        with self.trainer.strategy.local_phase():  # type: ignore[attr-defined]
            super().setup_data()
        if self._combined_loader is not None and self.trainer.strategy.rounds is not None:  # type: ignore[attr-defined]
            self.trainer.strategy.rounds.set_length()  # type: ignore[attr-defined]


class RoundEvaluationLoop(_EvaluationLoop):
    """Lightning's evaluation loop, with metrics joined over ranks before they are read and collectives local in it.

    Lightning compares the loaders' lengths over the ranks, one by one; silos may have different numbers of loaders.
    """

    def setup_data(self) -> None:
        last = self._combined_loader
        with self.trainer.strategy.local_phase():  # type: ignore[attr-defined]
            super().setup_data()
        if self._combined_loader is not last:
            self.trainer.strategy.check_evaluation_data(sum(self._max_batches))  # type: ignore[attr-defined]

    def _store_dataloader_outputs(self) -> None:
        self.trainer.strategy.merge_evaluation_metrics(self._results)  # type: ignore[attr-defined]
        super()._store_dataloader_outputs()

    def _on_evaluation_epoch_end(self) -> None:
        self.trainer.strategy.leave_local_phase()  # type: ignore[attr-defined]
        super()._on_evaluation_epoch_end()


def adopt_loops(trainer: Trainer) -> None:
    """Turns the Trainer's loops into those above; Lightning has no way to pass loops of one's own."""
    epoch_loop = trainer.fit_loop.epoch_loop
    trainer.fit_loop.__class__ = RoundFitLoop
    epoch_loop.__class__ = RoundEpochLoop
    epoch_loop.automatic_optimization.__class__ = RoundOptimization
    for loop in (epoch_loop.val_loop, trainer.validate_loop, trainer.test_loop):
        loop.__class__ = RoundEvaluationLoop
    epoch_loop._warning_cache.add("train_dataloader yielded None. If this was on purpose, ignore this warning...")


def keep_samplers(trainer: Trainer) -> None:
    """Stops Lightning from cutting loaders up by rank with a ``DistributedSampler``."""
    trainer._accelerator_connector.use_distributed_sampler = False


def set_round_length(trainer: Trainer, num_batches: int | None, fetch_limit: int) -> None:
    """Tells the loops how many batches the round has; Lightning asks the loader once only.

    Args:
        trainer: The Trainer.
        num_batches: Batches of the round, or None while unknown.
        fetch_limit: What the fetcher takes for the length while it is unknown; without a length it would prefetch.
    """
    fit_loop = trainer.fit_loop
    fit_loop.max_batches = float("inf") if num_batches is None else num_batches
    trainer.val_check_batch = fit_loop.max_batches
    assert fit_loop._combined_loader is not None
    assert fit_loop._data_fetcher is not None
    length = fetch_limit if num_batches is None else num_batches
    fit_loop._combined_loader.limits = [length]
    fit_loop._data_fetcher.length = length


def has_train_loader(trainer: Trainer) -> bool:
    """Whether the training loader has been made; several loaders are processed before it has."""
    return trainer.fit_loop._combined_loader is not None


def has_no_optimizer(optimizers: list[torch.optim.Optimizer]) -> bool:
    """Whether ``configure_optimizers`` returned None, for which Lightning puts a stand-in."""
    return not optimizers or any(isinstance(optimizer, _MockOptimizer) for optimizer in optimizers)


def current_round(trainer: Trainer) -> int:
    """Number of the round at hand; ``trainer.current_epoch`` is one behind while a resumed loader is built."""
    return trainer.fit_loop.epoch_progress.current.processed  # type: ignore[attr-defined]


def global_step(trainer: Trainer) -> int:
    """Optimizer steps as counted by the loops."""
    return trainer.fit_loop.epoch_loop.global_step


def set_global_step(trainer: Trainer, step: int) -> None:
    """Sets ``trainer.global_step`` on this rank."""
    epoch_loop = trainer.fit_loop.epoch_loop
    assert isinstance(epoch_loop, RoundEpochLoop)
    epoch_loop.set_global_step(step)


def logger_steps(trainer: Trainer) -> int:
    """The x-axis of the loggers: batches after which an optimizer stepped, on this rank."""
    epoch_loop = trainer.fit_loop.epoch_loop
    steps_now = 0 if epoch_loop.batch_progress.current.ready == 0 or epoch_loop._should_accumulate() else 1
    return epoch_loop._batches_that_stepped + steps_now


def set_logger_steps(trainer: Trainer, steps: int) -> None:
    """Sets the x-axis of the loggers after the round's last batch, which Lightning is about to count itself."""
    trainer.fit_loop.epoch_loop._batches_that_stepped = steps - 1


def loops_before_round(trainer: Trainer) -> dict[str, Any]:
    """The progress of the loops as it was when the round before had ended; a new epoch has just been counted."""
    state = copy.deepcopy(trainer.fit_loop.state_dict())
    for count in ("total", "current"):
        state["epoch_progress"][count]["ready"] -= 1
    return state


def pause_step_checkpoints(trainer: Trainer) -> list[tuple[ModelCheckpoint, int, Any]]:
    """Keeps ``ModelCheckpoint`` from saving inside a round, where each rank counts its own steps."""
    paused = []
    for callback in _model_checkpoints(trainer):
        paused.append((callback, callback._every_n_train_steps, callback._train_time_interval))
        callback._every_n_train_steps, callback._train_time_interval = 0, None
    return paused


def resume_step_checkpoints(paused: list[tuple[ModelCheckpoint, int, Any]]) -> None:
    """Ends what :func:`pause_step_checkpoints` began."""
    for callback, every_n_train_steps, train_time_interval in paused:
        callback._every_n_train_steps, callback._train_time_interval = every_n_train_steps, train_time_interval


def save_passed_steps(trainer: Trainer, before: int, after: int) -> None:
    """Lets ``ModelCheckpoint(every_n_train_steps=n)`` save if the round has passed a multiple of n."""
    for callback in _model_checkpoints(trainer):
        every = callback._every_n_train_steps
        if every < 1 or before // every == after // every or callback._should_skip_saving_checkpoint(trainer):
            continue
        candidates = callback._monitor_candidates(trainer)
        if callback.monitor is not None and callback.monitor not in candidates:
            callback._defer_save_until_validation = True
            continue
        callback._save_topk_checkpoint(trainer, candidates)
        callback._save_last_checkpoint(trainer, candidates)


def _model_checkpoints(trainer: Trainer) -> list[ModelCheckpoint]:
    return [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]


def train_results(trainer: Trainer) -> _ResultCollection:
    """What ``self.log`` has collected in training."""
    return trainer.fit_loop.epoch_loop._results


def epoch_schedulers(configs: list[LRSchedulerConfig]) -> Iterator[tuple[Any, bool]]:
    """Each scheduler that steps without a metric, and whether it steps every optimizer step."""
    for config in configs:
        if not config.reduce_on_plateau:
            yield config.scheduler, config.interval == "step"


@contextmanager
def seen_by_estimates(driver: Any, num_batches: Callable[[], int | float]) -> Iterator[None]:
    """Shows ``num_batches`` to ``trainer.estimated_stepping_batches`` inside the block."""
    driver.largest_num_batches = num_batches
    try:
        yield
    finally:
        driver.largest_num_batches = None


REDUCTIONS: dict[str, Any] = {"mean": torch.mean, "sum": torch.sum, "min": torch.min, "max": torch.max}


def describe(result: _ResultMetric) -> dict[str, Any]:
    """The settings with which a value was logged, as plain data."""
    meta = result.meta
    reduction = next(name for name in REDUCTIONS if getattr(meta, f"is_{name}_reduction"))
    return {
        "fx": meta.fx,
        "name": meta.name,
        "prog_bar": meta.prog_bar,
        "logger": meta.logger,
        "on_step": meta.on_step,
        "on_epoch": meta.on_epoch,
        "reduction": reduction,
        "add_dataloader_idx": meta.add_dataloader_idx,
        "dataloader_idx": meta.dataloader_idx,
        "metric_attribute": meta.metric_attribute,
        "is_tensor": result.is_tensor,
    }


def placeholder(settings: dict[str, Any], device: torch.device) -> _ResultMetric:
    """A logged value for a rank on which nothing was logged under that name."""
    settings = dict(settings)
    is_tensor = settings.pop("is_tensor")
    meta = _Metadata(reduce_fx=REDUCTIONS[settings.pop("reduction")], **settings)
    meta.sync = _Sync()
    result = _ResultMetric(meta, is_tensor).to(device)
    result.has_reset = False
    return result
