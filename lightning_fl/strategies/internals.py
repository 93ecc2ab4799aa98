"""Every touch of Lightning's private parts, in one place. Holds for lightning >= 2.6, < 2.7.

Each function and class says why it is needed; ``tests/trainer/test_internals.py`` fails when what it
relies on has changed.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelCheckpoint, Timer, WeightAveraging
from lightning.pytorch.core.optimizer import _MockOptimizer
from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop
from lightning.pytorch.loops.fetchers import _DataFetcher, _DataLoaderIterDataFetcher
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.optimization.automatic import _AutomaticOptimization
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.pytorch.trainer import call
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from lightning.pytorch.utilities.types import LRSchedulerConfig

from lightning_fl.engines.optimizer_states import Schedule

SubprocessLauncher = _SubprocessScriptLauncher


class _Fetched:
    """A batch that has been fetched already, for Lightning to fetch."""

    def __init__(self, data_fetcher: _DataFetcher) -> None:
        self._item = next(data_fetcher)
        self.done = data_fetcher.done

    def __next__(self) -> Any:
        return self._item


class RoundEpochLoop(_TrainingEpochLoop):
    """Lightning's epoch loop, in which an epoch is a round of several clients.

    - ``max_steps`` and ``should_stop`` count at the round's end only, where all ranks decide together; so does
      validation.
    - Accumulation windows, the frequency of step schedules and the ``batch_idx`` of ``training_step`` are counted
      within a client, so that they do not depend on which rank trains it.
    - Epoch schedules step when the round is closed.
    - A rank without clients passes through the round without the user's batch hooks.
    """

    @property
    def _rounds(self) -> Any:
        return self.trainer.strategy.rounds  # type: ignore[attr-defined]

    def _num_ready_batches_reached(self) -> bool:
        num_batches = self._rounds.plan.num_batches
        return num_batches is not None and self.batch_progress.current.ready >= num_batches

    @property
    def _is_training_done(self) -> bool:
        return self._num_ready_batches_reached()

    @property
    def done(self) -> bool:
        return self._is_training_done and self._is_validation_done

    def _should_check_val_fx(self, data_fetcher: _DataFetcher) -> bool:
        return self._num_ready_batches_reached() and self._should_check_val_epoch()

    def _accumulated_batches_reached(self) -> bool:
        plan, batch_idx = self._rounds.plan, self.batch_progress.current.ready - 1
        return batch_idx < 0 or plan.is_empty(batch_idx) or plan.locate(batch_idx).ends_window

    def _build_kwargs(self, kwargs: OrderedDict, batch: Any, batch_idx: int) -> OrderedDict:
        return super()._build_kwargs(kwargs, batch, self._rounds.plan.locate(batch_idx).offset)

    def update_lr_schedulers(self, interval: str, update_plateau_schedulers: bool) -> None:
        if interval == "epoch" and update_plateau_schedulers:
            super().update_lr_schedulers(interval, update_plateau_schedulers)
        elif interval == "step" and not update_plateau_schedulers and not self._should_accumulate():
            self._step_client_schedules()

    def _step_client_schedules(self) -> None:
        if not self.trainer.lightning_module.automatic_optimization:
            return
        offset = self._rounds.plan.locate(self.batch_progress.current.ready - 1).offset
        for config, schedule in self._rounds.schedules:
            if config.interval == "step" and (offset + 1) % config.frequency == 0:
                self.scheduler_progress.increment_ready()
                schedule.take_step()
                self.scheduler_progress.increment_completed()

    def step_epoch_schedules(self) -> None:
        """Steps the schedules that step once a round."""
        with warnings.catch_warnings():
            # a rank without clients steps its schedules though its optimizers have not stepped
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            self._update_learning_rates("epoch", update_plateau_schedulers=False)

    def advance(self, data_fetcher: _DataFetcher) -> None:
        goes_back_to_validation = self.restarting and self._should_check_val_fx(data_fetcher)
        if goes_back_to_validation or isinstance(data_fetcher, _DataLoaderIterDataFetcher):
            super().advance(data_fetcher)
            return
        fetched = _Fetched(data_fetcher)
        if self._rounds.plan.is_empty(self.batch_progress.current.ready):
            self._advance_without_client()
        else:
            super().advance(fetched)  # type: ignore[arg-type]

    def _advance_without_client(self) -> None:
        batch_idx = self.batch_progress.current.ready
        self.val_loop.restarting = False
        self.batch_progress.is_last_batch = True
        self.batch_progress.increment_ready()
        self.trainer._logger_connector.on_batch_start(None)
        self.batch_progress.increment_started()
        self.batch_progress.increment_processed()
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if getattr(callback, "follows_idle_rounds", isinstance(callback, Checkpoint | Timer)):
                callback.on_train_batch_end(self.trainer, self.trainer.lightning_module, None, None, batch_idx)
        self.trainer._logger_connector.on_batch_end()
        self.batch_progress.increment_completed()
        self.trainer._logger_connector.update_train_step_metrics()

    def on_advance_end(self, data_fetcher: _DataFetcher) -> None:
        self._rounds.settle()
        super().on_advance_end(data_fetcher)

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
        place = self.trainer.strategy.rounds.plan.locate(batch_idx)  # type: ignore[attr-defined]
        window_idx = 0 if place.starts_window else 1
        return super()._make_zero_grad_fn(window_idx if self.trainer.accumulate_grad_batches > 1 else 0, optimizer)


class RoundFitLoop(_FitLoop):
    """Lightning's fit loop, with the limit on batches left to the clients.

    ``trainer.estimated_stepping_batches`` multiplies ``max_batches`` by the epochs. Until training starts it must see
    the largest client, for whom schedules are made, not the sum over a rank's clients.
    """

    @property
    def max_batches(self) -> int | float:
        rounds = getattr(self.trainer.strategy, "rounds", None)
        if rounds is None or rounds.has_started or self._looks_itself:
            return self.__dict__["max_batches"]
        return rounds.largest_num_batches()

    @max_batches.setter
    def max_batches(self, value: int | float) -> None:
        self.__dict__["max_batches"] = value

    @property
    def _looks_itself(self) -> bool:
        return self.__dict__.get("looks_itself", False)

    @contextmanager
    def _looking_itself(self) -> Iterator[None]:
        before, self.__dict__["looks_itself"] = self._looks_itself, True
        try:
            yield
        finally:
            self.__dict__["looks_itself"] = before

    @property
    def done(self) -> bool:
        with self._looking_itself():
            return super().done

    def on_advance_end(self) -> None:
        super().on_advance_end()
        self.trainer.strategy.rounds.agree_to_stop()  # type: ignore[attr-defined]

    def setup_data(self) -> None:
        strategy: Any = self.trainer.strategy
        limit, self.trainer.limit_train_batches = self.trainer.limit_train_batches, 1.0
        strategy.limit_train_batches = limit
        try:
            with strategy.local_phase(), self._looking_itself():
                super().setup_data()
        finally:
            self.trainer.limit_train_batches = limit
        if self._combined_loader is not None and strategy.rounds is not None:
            strategy.rounds.set_length()


class RoundEvaluationLoop(_EvaluationLoop):
    """Lightning's evaluation loop, with metrics joined over ranks before they are read and collectives local in it.

    Lightning compares the loaders' lengths over the ranks, one by one; silos may have different numbers of loaders.
    """

    def setup_data(self) -> None:
        last = self._combined_loader
        with self.trainer.strategy.local_phase():  # type: ignore[attr-defined]
            super().setup_data()
        if self._combined_loader is not last:
            num_loaders = sum(num_batches > 0 for num_batches in self._max_batches)
            self.trainer.strategy.check_evaluation_data(num_loaders)  # type: ignore[attr-defined]

    def _store_dataloader_outputs(self) -> None:
        with self.trainer.strategy.evaluation_metrics.merged(self._results):  # type: ignore[attr-defined]
            super()._store_dataloader_outputs()

    def _on_evaluation_epoch_end(self) -> None:
        self.trainer.strategy.end_evaluation()  # type: ignore[attr-defined]
        super()._on_evaluation_epoch_end()


def adopt_loops(trainer: Trainer) -> None:
    """Turns the Trainer's loops into those above; Lightning has no way to pass loops of one's own."""
    epoch_loop = trainer.fit_loop.epoch_loop
    trainer.fit_loop.__class__ = RoundFitLoop
    epoch_loop.__class__ = RoundEpochLoop
    epoch_loop.automatic_optimization.__class__ = RoundOptimization
    for loop in (epoch_loop.val_loop, trainer.validate_loop, trainer.test_loop):
        loop.__class__ = RoundEvaluationLoop


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
    fit_loop.max_batches = trainer.val_check_batch = float("inf") if num_batches is None else num_batches
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
    ended_window = epoch_loop.batch_progress.current.ready > 0 and not epoch_loop._should_accumulate()
    return epoch_loop._batches_that_stepped + ended_window


def set_logger_steps(trainer: Trainer, steps: int) -> None:
    """Sets the x-axis of the loggers after the round's last batch, which Lightning is about to count itself."""
    trainer.fit_loop.epoch_loop._batches_that_stepped = steps - 1


def loops_before_round(trainer: Trainer) -> dict[str, Any]:
    """The progress of the loops as it was when the round before had ended; the new one has just been started."""
    state = copy.deepcopy(trainer.fit_loop.state_dict())
    for count in state["epoch_progress"].values():
        count["ready"] = count["started"] = count["processed"]
    return state


def pause_by_step(trainer: Trainer, averages: bool) -> list[tuple[Callback, dict[str, Any]]]:
    """Keeps ``ModelCheckpoint``, and ``WeightAveraging`` if told so, from acting on single clients inside a round."""
    paused: list[tuple[Callback, dict[str, Any]]] = []
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        settings: dict[str, Any] = {}
        if isinstance(callback, ModelCheckpoint):
            settings = {"_every_n_train_steps": 0, "_train_time_interval": None}
        elif isinstance(callback, WeightAveraging) and averages:
            settings = {"_latest_update_step": sys.maxsize}
        paused.append((callback, {name: getattr(callback, name) for name in settings}))
        vars(callback).update(settings)
    return paused


def resume_by_step(paused: list[tuple[Callback, dict[str, Any]]]) -> None:
    """Ends what :func:`pause_by_step` began."""
    for callback, settings in paused:
        vars(callback).update(settings)


def save_passed_steps(trainer: Trainer, before: int, after: int) -> None:
    """Lets ``ModelCheckpoint(every_n_train_steps=n)`` save if the round has passed a multiple of n."""
    callbacks = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    for callback in callbacks:
        every = callback._every_n_train_steps
        if every < 1 or before // every == after // every or callback._should_skip_saving_checkpoint(trainer):
            continue
        candidates = callback._monitor_candidates(trainer)
        if callback.monitor is not None and callback.monitor not in candidates:
            callback._defer_save_until_validation = True
            continue
        callback._save_topk_checkpoint(trainer, candidates)
        callback._save_last_checkpoint(trainer, candidates)


def average_passed_steps(trainer: Trainer, before: int, after: int) -> None:
    """Lets ``WeightAveraging`` take in the global model if it would have taken in one at a step of the round."""
    callbacks = [c for c in trainer.callbacks if isinstance(c, WeightAveraging)]  # type: ignore[attr-defined]
    for callback in callbacks:
        if any(callback.should_update(step_idx=step) for step in range(before, after)):
            assert callback._average_model is not None
            callback._average_model.update_parameters(trainer.lightning_module)
        callback._latest_update_step = after


def train_results(trainer: Trainer) -> _ResultCollection:
    """What ``self.log`` has collected in training."""
    return trainer.fit_loop.epoch_loop._results


def client_schedules(trainer: Trainer) -> list[tuple[LRSchedulerConfig, Schedule]]:
    """The schedules that step inside a client's local training, as the user's module steps them.

    Raises:
        MisconfigurationException: If one of them needs a metric, of which there is none inside a round.
    """
    automatic = trainer.lightning_module.automatic_optimization
    schedules = []
    for config in trainer.lr_scheduler_configs:
        if config.reduce_on_plateau and config.interval == "step" and automatic:
            raise MisconfigurationException(
                f"{type(config.scheduler).__name__} with interval='step' asks for a metric inside a round, where each "
                "client would give another. Use interval='epoch', which is a round."
            )
        if not config.reduce_on_plateau and (config.interval == "step" or not automatic):
            step = partial(call._call_lightning_module_hook, trainer, "lr_scheduler_step", config.scheduler, None)
            schedules.append((config, Schedule(config.scheduler, step, by_user=not automatic)))
    return schedules


def step_epoch_schedules(trainer: Trainer) -> None:
    """Steps the schedules that step once a round."""
    epoch_loop = trainer.fit_loop.epoch_loop
    assert isinstance(epoch_loop, RoundEpochLoop)
    if trainer.lightning_module.automatic_optimization:
        epoch_loop.step_epoch_schedules()


@contextmanager
def logging_out_of_loop(trainer: Trainer, training: bool) -> Iterator[_ResultCollection]:
    """Collects what the module logs inside the block apart from what the loops collect.

    Lightning knows one place for what is logged in an epoch; a step outside its loops must leave no trace there.
    """
    epoch_loop, connector = trainer.fit_loop.epoch_loop, trainer._logger_connector
    before = epoch_loop._results, connector._current_fx, connector._first_loop_iter
    epoch_loop._results, connector._current_fx, connector._first_loop_iter = _ResultCollection(training), None, False
    try:
        yield epoch_loop._results
    finally:
        epoch_loop._results, connector._current_fx, connector._first_loop_iter = before


def step_out_of_loop(trainer: Trainer, hook: str, batch: Any, batch_idx: int) -> tuple[Any, Any]:
    """Calls ``training_step`` or ``validation_step`` as the loops do, but no callback; also gives the batch it saw."""
    module = trainer.lightning_module
    batch = module._on_before_batch_transfer(trainer.precision_plugin.convert_input(batch), dataloader_idx=0)
    batch = call._call_strategy_hook(trainer, "batch_to_device", batch, dataloader_idx=0)
    results = results_at_hand(trainer)
    results.batch, results.batch_size = batch, None
    takes_index = is_param_in_hook_signature(getattr(module, hook), "batch_idx", min_args=2)
    return call._call_strategy_hook(trainer, hook, batch, *([batch_idx] if takes_index else [])), batch


def hook_out_of_loop(trainer: Trainer, hook: str) -> None:
    """Calls one of the module's epoch hooks outside the loops, so that it may log."""
    call._call_lightning_module_hook(trainer, hook)


def logged_out_of_loop(results: _ResultCollection) -> dict[str, float]:
    """What was logged by epoch since :func:`logging_out_of_loop` began, under the names that the user gave."""
    return {name: float(value) for name, value in results.metrics(on_step=False)["callback"].items()}


def log_to_loggers(trainer: Trainer, figures: dict[str, float]) -> None:
    """Gives figures to the loggers, at the step at which Lightning logs the epoch's metrics."""
    trainer._logger_connector.log_metrics(dict(figures))  # type: ignore[arg-type]


def results_at_hand(trainer: Trainer) -> _ResultCollection:
    """Where Lightning collects what is logged at the moment."""
    results = trainer._results
    assert results is not None
    return results


def clip_norms_with(precision: Any, clip: Callable[[torch.optim.Optimizer, float], bool]) -> None:
    """Lets ``clip`` clip gradients by norm before Lightning does; it returns whether it has."""

    def clip_grad_by_norm(optimizer: torch.optim.Optimizer, clip_val: int | float) -> None:
        if not clip(optimizer, float(clip_val)):
            type(precision).clip_grad_by_norm(precision, optimizer, clip_val)

    precision.clip_grad_by_norm = clip_grad_by_norm
