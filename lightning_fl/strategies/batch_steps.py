"""The two forms of a training step, with the same result: with Lightning's hooks around each batch, and without."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
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
from lightning_fl.strategies.log_buffer import LogBuffer
from lightning_fl.strategies.logged_values import LoggedValues
from lightning_fl.strategies.loops import RoundEpochLoop
from lightning_fl.strategies.out_of_loop import out_of_loop


class BatchOfOne(ValueError):
    """Raised for a batch of one example in front of a BatchNorm, which needs two to train."""


@contextmanager
def naming_batches_of_one() -> Iterator[None]:
    """Raises torch's error about a batch of one as :class:`BatchOfOne`: it is the client's data that do not fit."""
    try:
        yield
    except ValueError as error:
        if "Expected more than 1 value per channel when training" not in str(error):
            raise
        raise BatchOfOne(
            f"a batch of one example, and BatchNorm needs at least two to train ({error}). Drop an incomplete last "
            "batch with drop_last=True, or take another batch_size"
        ) from error


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

    @abstractmethod
    def flush_logs(self) -> None:
        """Passes logged values that were held back on to Lightning."""

    @abstractmethod
    def drop_logs(self) -> None:
        """Drops logged values that were held back."""

    def hold(self) -> None:
        """Called before a group trains whose steps may have to be undone."""
        self.loop.hold()

    def release(self) -> None:
        """Called when the group has trained, and its steps stay."""
        self.loop.release()

    def undo(self) -> None:
        """Undoes the steps since :meth:`hold`."""
        self.drop_logs()
        self.is_open = False
        self.loop.rewind()

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
    def results(self) -> logged.ClientResults:
        """Lightning's collection of the logged values."""
        return self.loop.collected


class HookedSteps(BatchSteps):
    """Each batch passes Lightning's batch hooks, those of the module and of every callback."""

    def train(self, task: ClientTask, batch: Any, position: BatchPosition, ends_round: bool) -> None:
        self.results.forget_sizes()
        outputs = self.loop.train_batch(batch, position, ends_round)
        self.is_open = True
        if isinstance(batch, StackedBatch):
            losses: Tensor | None = self.loop.trainer.strategy.group_losses  # type: ignore[attr-defined]
            size, is_known, mask = logged.count_examples(part(batch.content, 0)), True, batch.mask
        else:
            loss = None if outputs is None else outputs.get("loss")
            # Lightning has divided it by the number of batches in the accumulation window.
            losses = loss.detach() * position.window if isinstance(loss, Tensor) else None
            # The batch as the hooks have changed it, which is the one that `self.log` weighs its values by.
            (size, is_known), mask = logged.batch_size(self.results, self.loop.batch), None
        task.record(position, size, losses, mask, is_known)
        self.values.after_batch(self.results, size * (1 if mask is None else len(mask)))

    def flush_logs(self) -> None:
        """Does nothing: values reach Lightning in the step that logs them."""

    def drop_logs(self) -> None:
        """Does nothing: values reach Lightning in the step that logs them."""

    def end_batch(self) -> None:
        self.is_open = False
        self.loop.end_batch()


class TightSteps(BatchSteps):
    """Each batch goes straight to the trainer's step, since no hook looks at batches; others run by client group."""

    def __init__(self, loop: RoundEpochLoop, trainer: LocalTrainer, values: LoggedValues) -> None:
        super().__init__(loop, trainer, values)
        self._move = internals.batch_mover(loop.trainer)
        self._logs = LogBuffer(loop.trainer.lightning_module)

    def train(self, task: ClientTask, batch: Any, position: BatchPosition, ends_round: bool) -> None:
        loop = self.loop
        if batch is None:  # Lightning warns, and goes on without a step
            loop.train_batch(batch, position, ends_round)
            self.is_open = True
            task.record(position, 1, None)
            return
        batch = self._move(batch)
        # After the move and before the step: `self.log` infers the batch size from the batch noted here.
        loop.count_start(batch, position, ends_round)
        self.is_open = True
        self.results.forget_sizes()
        is_stacked = isinstance(batch, StackedBatch)
        size = _obvious_size(batch.content, dim=1) if is_stacked else _obvious_size(batch)
        with self._logs.in_step(None if is_stacked else size):
            losses = self.trainer.step(batch, position)
        if losses is None:
            internals.warn_of_no_loss()
        loop.count_trained()
        results = self.results
        if is_stacked:
            size = logged.count_examples(part(batch.content, 0)) if size is None else size
            task.record(position, size, losses, batch.mask)
            size *= len(batch.mask)
        else:
            size, is_known = logged.batch_size(results, batch) if size is None else (size, True)
            task.record(position, size, losses, is_known=is_known)
        if results:
            self.values.after_batch(results, size)

    def flush_logs(self) -> None:
        self._logs.flush()

    def drop_logs(self) -> None:
        self._logs.drop()

    def end_batch(self) -> None:
        self.is_open = False
        if self.loop.position.is_last:
            self.loop.show_group()
        self.loop.count_end()

    def end_round(self) -> None:
        if self.is_open:
            self.loop.show_group()
        self.is_open = False
        self.loop.end_without_hooks()


def _obvious_size(batch: Any, dim: int = 0) -> int | None:
    """What Lightning would infer as the size of a batch, found without its recursion; None if that takes more.

    Args:
        batch: The batch.
        dim: The dimension of its tensors that counts the examples: 1 if they are stacked over clients.
    """
    leaves = batch if type(batch) in (list, tuple) else [batch]
    if not all(isinstance(leaf, Tensor) and leaf.dim() > dim for leaf in leaves):
        return None
    sizes = {leaf.shape[dim] for leaf in leaves}
    return sizes.pop() if len(sizes) == 1 else None


def step_functions(
    trainer: L.Trainer,
    run_group: Callable[..., tuple[Tensor, Tensor]] | None = None,
    run_group_silently: Callable[..., tuple[Tensor, Tensor]] | None = None,
) -> StepFunctions:
    """The parts of a training step, from the Trainer's precision plug-in, gradient clipping and module.

    Args:
        trainer: The Trainer.
        run_group: The step of several clients: ``(stacked batch, *arguments) -> (loss, losses)``; None if there is
            none.
        run_group_silently: The same without logging.
    """
    module, precision = trainer.lightning_module, trainer.precision_plugin
    takes_index = logged.takes_batch_idx(module)
    scaler: Any = getattr(precision, "scaler", None)
    is_plain = type(precision) is L.pytorch.plugins.Precision

    def clip(optimizer: torch.optim.Optimizer) -> None:
        # Read at each step, as Lightning does: a callback may change it during training.
        if trainer.gradient_clip_val:
            module.clip_gradients(optimizer, trainer.gradient_clip_val, trainer.gradient_clip_algorithm)

    def training_step(batch: Any, offset: int) -> Any:
        # Past `strategy.training_step`: `batch_hook` has ruled out wrappers, overrides and callbacks that replace the
        # step, and the precision plug-in's context is entered by the engine.
        return module.training_step(batch, offset) if takes_index else module.training_step(batch)

    def of_group(run: Callable[..., tuple[Tensor, Tensor]] | None) -> Any:
        return None if run is None else lambda batch, offset: run(batch, *([offset] if takes_index else []))

    @contextmanager
    def silence(batch: Any) -> Iterator[None]:
        # A `log` that holds values back, or one of the user's, would not write to the collection out of the loop.
        held = vars(module).pop("log", None)
        try:
            with out_of_loop(trainer, training=True) as results:
                # `self.log` infers the batch size from these.
                results.batch, results.batch_size = batch, None
                yield
        finally:
            if held is not None:
                vars(module)["log"] = held

    def scaled_step(optimizer: torch.optim.Optimizer) -> None:
        scaler.step(optimizer)
        scaler.update()

    functions = StepFunctions(
        training_step,
        # The plain plug-in's context does nothing but is built from generators, which costs in every step.
        context=nullcontext if is_plain else precision.train_step_context,
        clip=clip,
        group_step=of_group(run_group),
        silence=silence,
        silent_group_step=of_group(run_group_silently),
    )
    if scaler is None:
        return functions
    return dataclasses.replace(
        functions,
        backward=lambda loss: scaler.scale(loss).backward(),
        unscale=scaler.unscale_,
        # The scaler skips the step if a gradient overflowed.
        optimizer_step=scaled_step,
    )
