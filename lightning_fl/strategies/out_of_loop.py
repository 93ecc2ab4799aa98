"""Steps of the user's module outside Lightning's loops, which leave no trace in training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import lightning as L
import torch
from lightning.fabric import Fabric
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import Optimizer
from torchmetrics import Metric, MetricCollection

from lightning_fl.data.client_loaders import count_batches
from lightning_fl.engines.evaluation_mode import evaluating
from lightning_fl.engines.isolation import DATA_AND_HANDLES
from lightning_fl.engines.local_trainer import loss_of
from lightning_fl.engines.module_state import Snapshot, capture
from lightning_fl.strategies import internals
from lightning_fl.strategies.metric_states import MetricStates
from lightning_fl.strategies.results import ResultCollection, batch_size

OUTSIDE = (
    *(L.Trainer, L.Callback, L.LightningDataModule, Strategy, LightningOptimizer, Logger, Profiler, Fabric),
    *(Metric, MetricCollection),  # they go on over a round's clients, see `metric_states.py`
)
"""Types of objects that a module may hold without their being a state of its training."""


def state_of_training(trainer: L.Trainer, managed: Iterable[torch.Tensor] = (), known: Iterable[Any] = ()) -> Snapshot:
    """The state of the module as training finds it, without optimizers and metrics.

    Args:
        trainer: The Trainer.
        managed: Tensors that the caller restores.
        known: Other objects that the caller looks after.
    """
    outside = (*OUTSIDE, *DATA_AND_HANDLES)
    return capture(trainer.lightning_module, managed, (*trainer.optimizers, *known), outside, reads_code=False)


@contextmanager
def out_of_loop(trainer: L.Trainer, training: bool) -> Iterator[ResultCollection]:
    """Collects what the module logs inside the block separately; then restores its metrics, buffers and attributes.

    Args:
        trainer: The Trainer.
        training: Whether training steps are run, or validation steps.

    Yields:
        The collection of the logged values.
    """
    module = trainer.lightning_module
    states = MetricStates(module, rank=0)
    metrics = states.snapshot()
    state = state_of_training(trainer, managed=module.parameters())
    try:
        with internals.logging_out_of_loop(trainer, training) as results:
            yield results
    finally:
        states.restore(metrics)
        state.restore()


def train_out_of_loop(
    trainer: L.Trainer, loader: Iterable[Any], optimizer: Optimizer, num_epochs: int, pass_length: int | None = None
) -> None:
    """Trains the module on a loader as a plain Trainer would, without callbacks, schedules and logging.

    Args:
        trainer: The Trainer, whose gradient clipping and accumulation apply.
        loader: One client's data.
        optimizer: The module's optimizer.
        num_epochs: Passes over the data.
        pass_length: The most batches of a pass. None: all.
    """
    module, window = trainer.lightning_module, trainer.accumulate_grad_batches
    with out_of_loop(trainer, training=True):
        for _ in range(num_epochs):
            optimizer.zero_grad(set_to_none=True)
            batches = islice(loader, pass_length)
            batch, index = next(batches, None), 0
            while batch is not None:
                # Read one ahead, because the last batch ends its accumulation window early and an iterator has no
                # length.
                following = next(batches, None)
                outputs, _ = internals.step_out_of_loop(trainer, "training_step", batch, index)
                loss = loss_of(outputs)
                if loss is not None:
                    (loss / window).backward()
                batch, index = following, index + 1
                if index % window == 0 or following is None:
                    module.configure_gradient_clipping(
                        optimizer, trainer.gradient_clip_val, trainer.gradient_clip_algorithm
                    )
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def validate_out_of_loop(trainer: L.Trainer, loader: Iterable[Any]) -> tuple[dict[str, float], int]:
    """Runs the module's ``validation_step`` on a loader, in evaluation mode and without callbacks.

    The Trainer's ``limit_val_batches`` applies, except for 0, which turns off the validation of the Trainer alone.

    Returns:
        The logged values by name, and the number of examples.

    Raises:
        MisconfigurationException: If the limit is a share that leaves no batch, or of an unknown length.
    """
    module, num_examples = trainer.lightning_module, 0
    with evaluating(module), out_of_loop(trainer, training=False) as results:
        for metric in (part for part in module.modules() if isinstance(part, Metric)):
            metric.reset()
        internals.hook_out_of_loop(trainer, "on_validation_epoch_start")
        for index, fetched in enumerate(islice(loader, _num_val_batches(trainer, loader))):
            _, batch = internals.step_out_of_loop(trainer, "validation_step", fetched, index)
            num_examples += batch_size(results, batch)[0]
        internals.hook_out_of_loop(trainer, "on_validation_epoch_end")
        return internals.logged_out_of_loop(results), num_examples


def _num_val_batches(trainer: L.Trainer, loader: Iterable[Any]) -> int | None:
    """The most batches of a validation; None: all."""
    limit = trainer.limit_val_batches
    if isinstance(limit, int):
        return limit or None
    if limit in (0.0, 1.0):
        return None
    # Rounded down, as Lightning does.
    num_batches = count_batches(loader)
    found = int((num_batches or 0) * limit)
    if not found:
        known = "an unknown number of" if num_batches is None else num_batches
        raise MisconfigurationException(
            f"limit_val_batches={limit} leaves none of {known} batches. Give a count such as limit_val_batches=1, or a "
            "larger share."
        )
    return found
