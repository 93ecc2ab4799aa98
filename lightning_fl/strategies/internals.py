"""Every touch of Lightning's private parts, in one place. Holds for lightning >= 2.6, < 2.7.

Each function and class says why it is needed; ``tests/trainer/test_internals.py`` fails when what it
relies on has changed.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint, WeightAveraging
from lightning.pytorch.core.optimizer import _MockOptimizer
from lightning.pytorch.loggers.utilities import _log_hyperparams
from lightning.pytorch.loops.fetchers import _DataLoaderIterDataFetcher
from lightning.pytorch.loops.optimization.automatic import Closure
from lightning.pytorch.plugins import Precision
from lightning.pytorch.plugins.io.wrapper import _WrappingCheckpointIO
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.pytorch.trainer import call
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from lightning.pytorch.utilities.types import LRSchedulerConfig
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lightning_fl.engines.optimizer_states import Schedule
from lightning_fl.engines.vectorized.stacking import StackedBatch

SubprocessLauncher = _SubprocessScriptLauncher


def outdated_last_checkpoints(trainer: Trainer) -> dict[str, bool]:
    """The last checkpoints that are older than the round, and whether they hold weights only.

    With ``monitor``, Lightning's last checkpoint is that of the last improvement: a run that goes on from it would
    train all rounds since then again. When a callback has saved last it says nowhere else.
    """
    return {
        callback.last_model_path: callback.save_weights_only
        for callback in _outdated(trainer)
        if "{" not in callback.CHECKPOINT_NAME_LAST
    }


def renew_named_last_checkpoints(trainer: Trainer) -> None:
    """Writes the outdated last checkpoints whose names tell the round, in place of those of older rounds."""
    for callback in _outdated(trainer):
        if "{" in callback.CHECKPOINT_NAME_LAST:
            callback._save_last_checkpoint(trainer, callback._monitor_candidates(trainer))


def _outdated(trainer: Trainer) -> list[ModelCheckpoint]:
    return [
        callback
        for callback in trainer.checkpoint_callbacks
        if isinstance(callback, ModelCheckpoint)
        and callback.save_last
        and callback.last_model_path
        and callback._last_global_step_saved != trainer.global_step
        # By steps or by the clock it is written elsewhere, and between every so many rounds it may be old.
        and callback._every_n_epochs >= 1
        and (trainer.current_epoch + 1) % callback._every_n_epochs == 0
    ]


class ReusableStrategy(ParallelStrategy):
    """A strategy object that serves any number of Trainers, one after the other, each with settings of its own.

    A Trainer leaves its accelerator, devices, plugins and launcher in its strategy, and Lightning takes them for the
    user's choice when another Trainer gets the strategy: it refuses to set them twice, or keeps the old ones.
    """

    default_checkpoint_io: type[CheckpointIO] = TorchCheckpointIO
    """What writes checkpoints if neither the user nor the Trainer has given a plug-in."""
    _as_built: dict[str, Any] | None = None

    @property
    def _accelerator(self) -> Accelerator | None:
        # Since `accelerator` below has a place of its own, only a Trainer that takes the strategy reads this, and
        # before anything else.
        if self._as_built is not None:
            self.take_new_trainer()
        return self.accelerator

    @_accelerator.setter
    def _accelerator(self, accelerator: Accelerator | None) -> None:
        self._own_accelerator = accelerator

    @property
    def accelerator(self) -> Accelerator | None:
        return self._own_accelerator

    @accelerator.setter
    def accelerator(self, accelerator: Accelerator | None) -> None:
        # The first thing that a Trainer sets: what is there before is the user's.
        if self._as_built is None:
            flags = ("_own_accelerator", "_precision_plugin", "_checkpoint_io", "cluster_environment")
            names = (*flags, "_parallel_devices", "_launcher", "num_nodes")
            self._as_built = {name: getattr(self, name) for name in names}
        self._own_accelerator = accelerator

    def take_new_trainer(self) -> None:
        """Called when another Trainer takes the strategy, which then is as it was before the first one."""
        vars(self).update(self._as_built or {})

    @property
    def checkpoint_io(self) -> CheckpointIO:
        io = self._checkpoint_io = self._checkpoint_io or self.default_checkpoint_io()
        if isinstance(io, _WrappingCheckpointIO):
            io.checkpoint_io = self.default_checkpoint_io()  # only if it wraps none yet
        return io

    @checkpoint_io.setter
    def checkpoint_io(self, io: CheckpointIO) -> None:
        self._checkpoint_io = io


def keep_samplers(trainer: Trainer) -> None:
    """Stops Lightning from cutting loaders up by rank with a ``DistributedSampler``."""
    # Lightning does so wherever a strategy is distributed, and `sync_dist` has no effect where it is not.
    trainer._accelerator_connector.use_distributed_sampler = False


class RequeueConnector(_SignalConnector):
    """Lightning's handlers of signals, of which that of a SLURM requeue saves what a federation can go on from."""

    def _slurm_sigusr_handler_fn(self, signum: Any, frame: Any) -> None:
        handler = super()._slurm_sigusr_handler_fn
        self.trainer.strategy.requeue(lambda: handler(signum, frame))  # type: ignore[attr-defined]


def adopt_signals(trainer: Trainer) -> None:
    """Lets the strategy save before a requeue; Lightning registers its handlers after it has connected the strategy."""
    trainer._signal_connector.__class__ = RequeueConnector


def give_mesh(module: LightningModule, mesh: Any) -> None:
    """Lets ``module.device_mesh`` return the mesh, as Lightning's ``ModelParallelStrategy`` does."""
    module._device_mesh = mesh


def set_round_length(trainer: Trainer, num_batches: int | None, fetch_limit: int) -> None:
    """Sets the round's number of batches in the loops; Lightning asks the loader only once.

    Args:
        trainer: The Trainer.
        num_batches: Batches of the round, or None while unknown.
        fetch_limit: The fetcher's length while the number is unknown; without a length it would prefetch.
    """
    fit_loop = trainer.fit_loop
    fit_loop.max_batches = trainer.val_check_batch = float("inf") if num_batches is None else num_batches
    assert fit_loop._combined_loader is not None
    assert fit_loop._data_fetcher is not None
    length = fetch_limit if num_batches is None else num_batches
    fit_loop._combined_loader.limits = [length]
    fit_loop._data_fetcher.length = length


def is_setting_up_data(trainer: Trainer) -> bool:
    """Whether the fit loop itself is reading lengths, of the round and not of the largest client."""
    return trainer.fit_loop.__dict__.get("is_read_by_loop", False)


def has_train_loader(trainer: Trainer) -> bool:
    """Whether the training loader has been made; several loaders are processed before it has."""
    return trainer.fit_loop._combined_loader is not None


def has_no_optimizer(optimizers: list[torch.optim.Optimizer]) -> bool:
    """Whether ``configure_optimizers`` returned None, which Lightning replaces by a mock optimizer."""
    return not optimizers or any(isinstance(optimizer, _MockOptimizer) for optimizer in optimizers)


def current_round(trainer: Trainer) -> int:
    """Number of the current round; ``trainer.current_epoch`` is one behind while a resumed loader is built."""
    return trainer.fit_loop.epoch_progress.current.processed  # type: ignore[attr-defined]


def set_round(trainer: Trainer, round: int) -> None:
    """Lets the loops go on with a round that is not the next one."""
    progress = trainer.fit_loop.epoch_progress
    for count in (progress.current, progress.total):
        count.ready = count.completed = round
        count.started = count.processed = round  # type: ignore[attr-defined]


def is_after_last(trainer: Trainer) -> bool:
    """Whether the current round is beyond ``max_epochs``."""
    last = trainer.fit_loop.max_epochs
    return last is not None and last >= 0 and current_round(trainer) >= last


def global_step(trainer: Trainer) -> int:
    """Optimizer steps as counted by the loops."""
    return trainer.fit_loop.epoch_loop.global_step


def logger_steps(trainer: Trainer) -> int:
    """The x-axis of the loggers: batches after which an optimizer stepped, on this rank."""
    epoch_loop = trainer.fit_loop.epoch_loop
    ended_window = epoch_loop.batch_progress.current.ready > 0 and not epoch_loop._should_accumulate()
    return epoch_loop._batches_that_stepped + ended_window


def set_logger_steps(trainer: Trainer, steps: int) -> None:
    """Sets the x-axis of the loggers after the round's last batch, which Lightning is about to count itself."""
    trainer.fit_loop.epoch_loop._batches_that_stepped = steps - 1


def loops_before_round(trainer: Trainer) -> dict[str, Any]:
    """The loops' progress as it was at the end of the previous round; the current one has only just started."""
    # A copy, because the loops go on counting while this is kept for an exception.
    state = copy.deepcopy(trainer.fit_loop.state_dict())
    for count in state["epoch_progress"].values():
        count["ready"] = count["started"] = count["processed"]
    return state


def pause_by_step(trainer: Trainer, averages: bool) -> list[tuple[Callback, dict[str, Any]]]:
    """Keeps ``ModelCheckpoint``, and ``WeightAveraging`` if ``averages``, from acting on clients inside a round."""
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
        # The rest is what the callback does in `on_train_batch_end`, which saves only at exact multiples of n; the end
        # of a round jumps over them.
        candidates = callback._monitor_candidates(trainer)
        if callback.monitor is not None and callback.monitor not in candidates:
            callback._defer_save_until_validation = True
            continue
        callback._save_topk_checkpoint(trainer, candidates)
        callback._save_last_checkpoint(trainer, candidates)


def average_passed_steps(trainer: Trainer, before: int, after: int) -> None:
    """Lets ``WeightAveraging`` average the global model in, if it would have averaged at a step of the round."""
    callbacks = [c for c in trainer.callbacks if isinstance(c, WeightAveraging)]  # type: ignore[attr-defined]
    for callback in callbacks:
        if any(callback.should_update(step_idx=step) for step in range(before, after)):
            assert callback._average_model is not None
            callback._average_model.update_parameters(trainer.lightning_module)
        # Also where nothing was averaged: the callback must not take the jump of `global_step` for a step of its own.
        callback._latest_update_step = after


@contextmanager
def consulting(trainer: Trainer, may_consult: Callable[[Any, str], bool]) -> Iterator[None]:
    """A block in which ``EarlyStopping`` looks at its metric only if ``may_consult(callback, metric)``.

    Lightning raises if the metric has never been logged, and counts an old value once more if it was not logged again.
    """
    stoppers = [callback for callback in trainer.callbacks if isinstance(callback, EarlyStopping)]  # type: ignore[attr-defined]

    def skips(stopper: EarlyStopping, trainer: Trainer) -> bool:
        return type(stopper)._should_skip_check(stopper, trainer) or not may_consult(stopper, stopper.monitor)

    for stopper in stoppers:
        vars(stopper)["_should_skip_check"] = partial(skips, stopper)
    try:
        yield
    finally:
        for stopper in stoppers:
            del vars(stopper)["_should_skip_check"]


def monitored_metrics(trainer: Trainer, training: bool) -> dict[str, Tensor]:
    """``trainer.callback_metrics``, with those of the current epoch's training if ``training``.

    While the validation loop runs, Lightning leaves the latter out.
    """
    own = train_results(trainer).metrics(on_step=False)["callback"] if training else {}
    return {**trainer.callback_metrics, **own}


def is_ending_resumed_round(trainer: Trainer) -> bool:
    """Whether a run is resumed inside a round, of which only what follows the validation is left to do."""
    return trainer.fit_loop.restarted_mid_epoch


def restore_metrics(trainer: Trainer, metrics: dict[str, Tensor]) -> None:
    """Restores ``trainer.callback_metrics`` of a checkpoint; Lightning's own do not hold them."""
    device = trainer.strategy.root_device
    trainer._logger_connector._callback_metrics.update({name: value.to(device) for name, value in metrics.items()})


def train_results(trainer: Trainer) -> _ResultCollection:
    """The values that ``self.log`` has collected in training."""
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
                f"{type(config.scheduler).__name__} with interval='step' needs a metric inside a round, where each "
                "client has its own. Use interval='epoch', which is a round."
            )
        if not config.reduce_on_plateau and (config.interval == "step" or not automatic):
            step = partial(call._call_lightning_module_hook, trainer, "lr_scheduler_step", config.scheduler, None)
            scheduler: Any = config.scheduler
            by_state = isinstance(scheduler, ReduceLROnPlateau) or not hasattr(scheduler, "last_epoch")
            schedules.append((config, Schedule(scheduler, step, not automatic, by_state and not automatic)))
    return schedules


@contextmanager
def logging_out_of_loop(trainer: Trainer, training: bool) -> Iterator[_ResultCollection]:
    """Collects what the module logs inside the block separately from what the loops collect.

    Lightning has one collection of logged values for an epoch, which a step outside its loops must not change.
    """
    epoch_loop, connector = trainer.fit_loop.epoch_loop, trainer._logger_connector
    before = epoch_loop._results, connector._current_fx, connector._first_loop_iter
    epoch_loop._results, connector._current_fx, connector._first_loop_iter = _ResultCollection(training), None, False
    try:
        yield epoch_loop._results
    finally:
        epoch_loop._results, connector._current_fx, connector._first_loop_iter = before


def step_out_of_loop(trainer: Trainer, hook: str, batch: Any, batch_idx: int) -> tuple[Any, Any]:
    """Calls ``training_step`` or ``validation_step`` as the loops do, without callbacks; returns output and batch."""
    module, batch = trainer.lightning_module, transfer(trainer, batch)
    results = active_results(trainer)
    # `self.log` infers the batch size from these, which Lightning's loops set before each step.
    results.batch, results.batch_size = batch, None
    takes_index = is_param_in_hook_signature(getattr(module, hook), "batch_idx", min_args=2)
    return call._call_strategy_hook(trainer, hook, batch, *([batch_idx] if takes_index else [])), batch


def transfer(trainer: Trainer, batch: Any) -> Any:
    """Moves a batch to the device as the loops do, with the transfer hooks of module and datamodule."""
    batch = trainer.lightning_module._on_before_batch_transfer(
        trainer.precision_plugin.convert_input(batch), dataloader_idx=0
    )
    return call._call_strategy_hook(trainer, "batch_to_device", batch, dataloader_idx=0)


def hook_out_of_loop(trainer: Trainer, hook: str) -> None:
    """Calls one of the module's epoch hooks outside the loops, so that it may log."""
    call._call_lightning_module_hook(trainer, hook)


def logged_out_of_loop(results: _ResultCollection) -> dict[str, float]:
    """What was logged by epoch since :func:`logging_out_of_loop` began, under the names that the user gave."""
    return {name: float(value) for name, value in results.metrics(on_step=False)["callback"].items()}


def own_hyperparameters(trainer: Trainer) -> dict[str, Any]:
    """The hyper-parameters of module and datamodule that Lightning gives to the loggers when a fit starts.

    Taken by Lightning's own function with a stand-in for the loggers, because only it knows which are to be logged.
    """
    found: dict[str, Any] = {}
    logger = SimpleNamespace(log_hyperparams=found.update, log_graph=lambda module: None, save=lambda: None)
    module, data = trainer.lightning_module, getattr(trainer, "datamodule", None)
    _log_hyperparams(SimpleNamespace(loggers=[logger], lightning_module=module, datamodule=data))  # type: ignore[arg-type]
    return found


def log_figures(trainer: Trainer, figures: dict[str, float], of_rank: tuple[str, ...] = ()) -> None:
    """Logs figures, at the step at which Lightning logs the epoch's metrics, and lets callbacks monitor them.

    Args:
        trainer: The Trainer.
        figures: The figures by name.
        of_rank: How the names of figures begin that differ between ranks, so that callbacks must not decide by them.
    """
    connector = trainer._logger_connector
    connector.log_metrics(dict(figures))  # type: ignore[arg-type]
    shared = {name: value for name, value in figures.items() if not name.startswith(of_rank)}
    connector._callback_metrics.update({n: torch.tensor(value, dtype=torch.float64) for n, value in shared.items()})


def active_results(trainer: Trainer) -> _ResultCollection:
    """The collection to which ``self.log`` adds at the moment."""
    results = trainer._results
    assert results is not None
    return results


def clip_norms_with(precision: Any, clip: Callable[[torch.optim.Optimizer, float], bool]) -> None:
    """Lets ``clip`` clip gradients by norm in Lightning's place, if it returns that it has."""

    def clip_grad_by_norm(optimizer: torch.optim.Optimizer, clip_val: int | float) -> None:
        if not clip(optimizer, float(clip_val)):
            type(precision).clip_grad_by_norm(precision, optimizer, clip_val)

    precision.clip_grad_by_norm = clip_grad_by_norm


def clip_norms_as_before(precision: Any) -> None:
    """Ends what :func:`clip_norms_with` began."""
    vars(precision).pop("clip_grad_by_norm", None)


def batch_mover(trainer: Trainer) -> Callable[[Any], Any]:
    """A function that moves a batch to the module's precision and device, where no transfer hook is overridden.

    A flat list or tuple of tensors that are on the CPU already is returned as it is; Lightning would rebuild it.
    """
    strategy, precision = trainer.strategy, trainer.precision_plugin
    converts = type(precision).convert_input is not Precision.convert_input
    is_cpu = strategy.root_device.type == "cpu"

    def move(batch: Any) -> Any:
        batch = precision.convert_input(batch) if converts else batch
        return batch if is_cpu and _is_on_cpu(batch) else strategy.batch_to_device(batch)

    return move


def _is_on_cpu(batch: Any) -> bool:
    if isinstance(batch, Tensor):
        return batch.is_cpu
    if isinstance(batch, StackedBatch):
        return _is_on_cpu(batch.content)
    return type(batch) in (list, tuple) and all(isinstance(leaf, Tensor) and leaf.is_cpu for leaf in batch)


@contextmanager
def running_training_step(module: Any) -> Iterator[None]:
    """A block in which ``self.log`` takes ``training_step`` to be running, where Lightning does not call it."""
    attributes = vars(module)  # past the checks of `nn.Module`, which cost more than this in each step
    attributes["_current_fx_name"] = "training_step"
    try:
        yield
    finally:
        attributes["_current_fx_name"] = None


def bookkeeping(owner: Any) -> tuple[str, ...]:
    """Names of a module's attributes in which Lightning keeps what no step computes with."""
    # The hook that is running, and a cache of the names of logged metrics.
    return ("_current_fx_name", "_metric_attributes") if isinstance(owner, LightningModule) else ()


@contextmanager
def trainer_replaced(module: LightningModule, stand_in: Any) -> Iterator[None]:
    """Gives the module and its submodules ``stand_in`` as their Trainer; the public setter takes Trainers only."""
    trainers = [(own, own._trainer) for own in module.modules() if isinstance(own, LightningModule)]
    for owner, _ in trainers:
        object.__setattr__(owner, "_trainer", stand_in)
    try:
        yield
    finally:
        for owner, trainer in trainers:
            object.__setattr__(owner, "_trainer", trainer)


def warn_of_no_loss() -> None:
    """Gives Lightning's warning of a ``training_step`` that returned None, once in a process as there."""
    Closure.warning_cache.warn("`training_step` returned `None`. If this was on purpose, ignore this warning...")


def skips_backward(trainer: Trainer) -> bool:
    """Whether steps run forward only, as when ``StochasticWeightAveraging`` updates BatchNorm statistics."""
    return trainer.fit_loop.epoch_loop.automatic_optimization._skip_backward


def fetches_itself(trainer: Trainer) -> bool:
    """Whether ``training_step`` takes ``dataloader_iter`` and so fetches its batches itself."""
    return isinstance(trainer.fit_loop._data_fetcher, _DataLoaderIterDataFetcher)
