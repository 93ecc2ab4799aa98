"""Finds and calls the hooks of the user's module and callbacks, and tells whether one of them looks at batches."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import (
    LearningRateMonitor,
    ModelCheckpoint,
    RichProgressBar,
    Timer,
    TQDMProgressBar,
)
from lightning.pytorch.plugins import DoublePrecision, HalfPrecision, MixedPrecision, Precision
from lightning.pytorch.profilers import PassThroughProfiler

from lightning_fl.strategies import internals

TRANSFER_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
BATCH_HOOKS = (
    *TRANSFER_HOOKS,
    "on_train_batch_start",
    "on_train_batch_end",
    "backward",
    "on_before_backward",
    "on_after_backward",
    "on_before_zero_grad",
    "on_before_optimizer_step",
    "optimizer_step",
    "optimizer_zero_grad",
    "configure_gradient_clipping",
    "lr_scheduler_step",
)
"""Hooks that see a batch, its gradients or its optimizer step."""
STRATEGY_HOOKS = ("training_step", "backward", "optimizer_step", "batch_to_device", "on_train_batch_start")
SERVED_BY_GROUP = (ModelCheckpoint, Timer, TQDMProgressBar, RichProgressBar)
"""Lightning's callbacks whose batch hooks work as well at the end of each client group."""
PRECISIONS = (Precision, DoublePrecision, HalfPrecision, MixedPrecision)


def batch_hook(trainer: L.Trainer, strategy_type: type) -> str | None:
    """Names a hook that looks at single batches, so that each must pass Lightning's batch hooks; None if none does.

    Args:
        trainer: The Trainer.
        strategy_type: The strategy's class as this package defines it; a subclass may look at batches.
    """
    return next(_batch_hooks(trainer, strategy_type), None)


def _batch_hooks(trainer: L.Trainer, strategy_type: type) -> Iterator[str]:
    module, strategy = trainer.lightning_module, trainer.strategy
    if not module.automatic_optimization:
        yield f"{type(module).__name__} optimizes by hand"
    for hook in BATCH_HOOKS:
        if is_overridden(module, hook, L.LightningModule):
            yield f"{type(module).__name__}.{hook}"
    datamodule = getattr(trainer, "datamodule", None)
    for hook in TRANSFER_HOOKS if datamodule is not None else ():
        if is_overridden(datamodule, hook, L.LightningDataModule):
            yield f"{type(datamodule).__name__}.{hook}"
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        yield from hooks_of(callback)
    for hook in STRATEGY_HOOKS:
        # A subclass of the strategy by the user; the package's own methods are served by the tight loop.
        if getattr(type(strategy), hook) is not getattr(strategy_type, hook):
            yield f"{type(strategy).__name__}.{hook}"
    # A wrapper's forward pass must run, which the tight loop would go around.
    if strategy.model is not module:
        yield "a wrapper around the module"
    if type(trainer.precision_plugin) not in PRECISIONS:
        yield f"the precision plug-in {type(trainer.precision_plugin).__name__}"
    profiler = trainer.profiler  # type: ignore[attr-defined]
    # A profiler measures the actions that Lightning's batch hooks announce.
    if type(profiler) is not PassThroughProfiler:
        yield f"the profiler {type(profiler).__name__}"
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        yield "fast_dev_run"
    if internals.skips_backward(trainer):
        yield "a pass without gradients, which updates BatchNorm's statistics"
    for optimizer in trainer.optimizers:
        if isinstance(optimizer, torch.optim.LBFGS):
            yield "LBFGS, which computes several losses in a step"
        elif not type(optimizer).step.__module__.startswith("torch.optim."):
            yield f"{type(optimizer).__name__}.step, which may compute the loss again"


def hooks_of(callback: L.Callback) -> Iterator[str]:
    """Names a callback's hooks that look at single batches."""
    # The exact type: a subclass may look at batches in the same hooks.
    if type(callback) in SERVED_BY_GROUP or getattr(callback, "serves_batches_by_group", False):
        return
    if type(callback) is LearningRateMonitor and callback.logging_interval == "epoch":
        return
    for hook in BATCH_HOOKS:
        # Some of these hooks exist for modules only.
        if hasattr(L.Callback, hook) and is_overridden(callback, hook, L.Callback):
            yield f"{type(callback).__name__}.{hook}"
    step = getattr(callback, "run_training_step", None)
    # By name, because `callbacks` stands above this room and its base class can't be imported here.
    if step is not None and not getattr(step, "__qualname__", "").startswith("FederatedCallback."):
        yield f"{type(callback).__name__}.run_training_step"


def is_overridden(holder: Any, hook: str, base: type) -> bool:
    """Whether an object has a hook of its own, by its class or set on the object itself."""
    # On the object too: `PartitionedDataModule` forwards the hooks of its datamodule in this way.
    return hook in vars(holder) or getattr(type(holder), hook, None) is not getattr(base, hook, None)


def has_hooks(trainer: L.Trainer, *names: str) -> bool:
    """Whether the user's module or callbacks have one of these hooks; Lightning's own act alike on all ranks."""
    holders = [trainer.lightning_module, *trainer.callbacks]  # type: ignore[attr-defined]
    return any(_is_of_user(getattr(holder, name, None)) for holder in holders for name in names)


def run_training_step(trainer: L.Trainer, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Runs one client's training step, through ``run_training_step`` of the callbacks that have it."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        own = getattr(callback, "run_training_step", None)
        if own is not None:
            step = partial(own, trainer, trainer.lightning_module, step)
    return step(*args, **kwargs)


def call_federated_hook(trainer: L.Trainer, view: Any, hook: str, *args: Any) -> None:
    """Calls a hook of :class:`~lightning_fl.callbacks.FederatedCallback`, with ``view`` if it is a parameter."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    # What guards the clients' examples brackets local training, so that it sees what other callbacks write.
    if hook in ("on_client_start", "on_next_phase", "on_phase_end"):
        callbacks = sorted(
            callbacks, key=lambda own: getattr(own, "protects_examples", False), reverse=hook != "on_phase_end"
        )
    for callback in callbacks:
        # By name, because `callbacks` stands above this room and its base class can't be imported here.
        method: Callable[..., None] | None = getattr(callback, hook, None)
        if method is not None:
            # The cache gets the plain function: a bound method in it would keep the callback alive.
            keywords = {"view": view} if _takes_view(getattr(method, "__func__", method)) else {}
            method(trainer, trainer.lightning_module, *args, **keywords)


@lru_cache(maxsize=256)
def _takes_view(function: Callable[..., Any]) -> bool:
    return "view" in inspect.signature(function).parameters


def _is_of_user(hook: Any) -> bool:
    function = getattr(hook, "__func__", hook)
    # `has_hooks` decides whether a collective is run, so all ranks must answer alike: it looks only at which package a
    # hook comes from.
    return function is not None and not getattr(function, "__module__", "").startswith(("lightning.", "lightning_fl."))
