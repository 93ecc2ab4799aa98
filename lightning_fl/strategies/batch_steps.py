"""The two forms of a training step, with the same result: with Lightning's hooks around each batch, and without."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lightning_fl.clients.local_work import BatchPosition
from lightning_fl.engines import LocalTrainer, StepFunctions
from lightning_fl.engines.vectorized.stacking import StackedBatch, part
from lightning_fl.federation import ClientTask
from lightning_fl.strategies import internals
from lightning_fl.strategies import results as logged
from lightning_fl.strategies.logged_values import LoggedValues
from lightning_fl.strategies.loops import RoundEpochLoop


class BatchSteps(ABC):
    """Trains on the batches of a round, one after the other.

    Call ``train`` for each batch, and ``end_batch`` after it: for a client's last batch when the client has finished,
    for the round's last batch when the round has been closed.

    Args:
        loop: Lightning's epoch loop.
        trainer: Trains the client groups.
        values: Sums up the logged values.
    """

    def __init__(self, loop: RoundEpochLoop, trainer: LocalTrainer, values: LoggedValues) -> None:
        self.loop = loop
        self.trainer = trainer
        self.values = values
        self.is_open = False
        """Whether ``end_batch`` is still to be called for the last batch."""

    @abstractmethod
    def train(self, task: ClientTask, batch: Any, position: BatchPosition, ends_round: bool) -> None:
        """Trains a group on a batch."""

    @abstractmethod
    def end_batch(self) -> None:
        """Ends the last batch: hooks, counters and logging."""

    def skip(self) -> None:
        """Counts a batch that was not there, because this rank ends the round without one."""
        self.loop.skip_batch()

    def end_round(self) -> None:
        """Ends the round's last batch, if there was one, after the round has been closed."""
        if self.is_open:
            self.end_batch()
        else:
            self.loop.end_without_hooks()

    @property
    def results(self) -> logged.ResultCollection:
        """Lightning's collection of the logged values."""
        return self.loop.collected


class HookedSteps(BatchSteps):
    """Each batch passes Lightning's batch hooks, those of the module and of every callback."""

    def train(self, task: ClientTask, batch: Any, position: BatchPosition, ends_round: bool) -> None:
        outputs = self.loop.train_batch(batch, position, ends_round)
        self.is_open = True
        if isinstance(batch, StackedBatch):
            losses: Tensor | None = self.loop.trainer.strategy.group_losses  # type: ignore[attr-defined]
            size, mask = logged.count_examples(part(batch.content, 0)), batch.mask
        else:
            loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
            # Lightning has divided it by the number of batches in the accumulation window.
            losses = loss.detach() * position.window if isinstance(loss, Tensor) else None
            size, mask = logged.batch_size(self.results, self.loop.batch), None
        task.record(position, size, losses, mask)
        self.values.after_batch(self.results, size * (1 if mask is None else len(mask)))

    def end_batch(self) -> None:
        self.is_open = False
        self.loop.end_batch()


class TightSteps(BatchSteps):
    """Each batch goes straight to the trainer's step, since no hook looks at batches; others run by client group."""

    def __init__(self, loop: RoundEpochLoop, trainer: LocalTrainer, values: LoggedValues) -> None:
        super().__init__(loop, trainer, values)
        self._move = internals.batch_mover(loop.trainer)
        self._module = loop.trainer.lightning_module

    def train(self, task: ClientTask, batch: Any, position: BatchPosition, ends_round: bool) -> None:
        loop = self.loop
        batch = self._move(batch)
        loop.count_start(batch, position, ends_round)
        self.is_open = True
        internals.set_running_hook(self._module, "training_step")
        losses = self.trainer.step(batch, position)
        internals.set_running_hook(self._module, None)
        loop.count_trained()
        results = self.results
        if isinstance(batch, StackedBatch):
            size, mask = _size(part(batch.content, 0)), batch.mask
            task.record(position, size, losses, mask)
            size *= len(mask)
        else:
            size = _size(batch) if results.batch_size is None else results.batch_size
            task.record(position, size, losses)
        if results:
            self.values.after_batch(results, size)

    def end_batch(self) -> None:
        self.is_open = False
        if self.loop.position.is_last:
            self.loop.show_group()
        self.loop.count_end()

    def end_round(self) -> None:
        self.is_open = False
        self.loop.end_without_hooks()


def _size(batch: Any) -> int:
    """What Lightning would infer as the size of a batch, found without its recursion where that is obvious."""
    if type(batch) not in (list, tuple):
        return logged.count_examples(batch)
    size = None
    for leaf in batch:
        if not isinstance(leaf, Tensor) or not leaf.dim() or (size is not None and leaf.shape[0] != size):
            return logged.count_examples(batch)
        size = leaf.shape[0]
    return logged.count_examples(batch) if size is None else size


def step_functions(trainer: L.Trainer, run_group: Callable[..., tuple[Tensor, Tensor]] | None = None) -> StepFunctions:
    """The parts of a training step, from the Trainer's precision plug-in, gradient clipping and module.

    Args:
        trainer: The Trainer.
        run_group: The step of several clients: ``(stacked batch, *arguments) -> (loss, losses)``; None if there is
            none.
    """
    module, precision = trainer.lightning_module, trainer.precision_plugin
    takes_index = logged.takes_batch_idx(module)
    scaler: Any = getattr(precision, "scaler", None)
    is_plain = type(precision) is L.pytorch.plugins.Precision
    clip = None
    if trainer.gradient_clip_val:
        value, algorithm = trainer.gradient_clip_val, trainer.gradient_clip_algorithm
        clip = partial(module.clip_gradients, gradient_clip_val=value, gradient_clip_algorithm=algorithm)

    def training_step(batch: Any, offset: int) -> Any:
        return module.training_step(batch, offset) if takes_index else module.training_step(batch)

    def group_step(batch: Any, offset: int) -> tuple[Tensor, Tensor]:
        assert run_group is not None
        return run_group(batch, *([offset] if takes_index else []))

    def scaled_step(optimizer: torch.optim.Optimizer) -> None:
        scaler.step(optimizer)
        scaler.update()

    functions = StepFunctions(
        training_step,
        context=nullcontext if is_plain else precision.train_step_context,
        clip=clip,
        group_step=None if run_group is None else group_step,
    )
    if scaler is None:
        return functions
    return dataclasses.replace(
        functions,
        backward=lambda loss: scaler.scale(loss).backward(),
        unscale=scaler.unscale_,
        optimizer_step=scaled_step,
    )
