"""Runs the steps of client groups inside Lightning: one batch of the loop is a batch of each client of the group."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lightning_fl.data.lazy_batches import LazyLoader
from lightning_fl.engines import Vectorized, VectorizedEngine
from lightning_fl.engines.module_state import Snapshot, capture
from lightning_fl.engines.vectorized.grouping import Grouping
from lightning_fl.engines.vectorized.grouping_memory import digest
from lightning_fl.engines.vectorized.stacking import NotVectorizable, StackedBatch, part
from lightning_fl.federation import ClientTask
from lightning_fl.federation.group_data import StackedData
from lightning_fl.seeding import loader_generators
from lightning_fl.strategies import internals
from lightning_fl.strategies import results as logged
from lightning_fl.strategies.internals import trainer_replaced
from lightning_fl.strategies.vectorized.compatibility import (
    MAX_FLOPS_ON_CPU,
    check_equivalence,
    params_with_gradients,
    reason_of,
)
from lightning_fl.strategies.vectorized.log_capture import LogCalls, LogCapture
from lightning_fl.strategies.vectorized.step_watch import OpaqueProxy, StepWatch
from lightning_fl.torch_internals import pytree, version_counter
from lightning_fl.types import ClientId


class VectorizedDriver:
    """Runs the steps of client groups, and logs what they log.

    Args:
        trainer: The Trainer.
        engine: Trains the groups.
        settings: The settings of the engine, such as the number of clients that train together.
        is_asked_for: Whether the user has requested the vectorized engine, so that an obstacle is an error.
        allows_random: Whether random numbers in a step may differ from those that a client alone would draw, and
            depend on the other clients of the group.
    """

    def __init__(
        self,
        trainer: L.Trainer,
        engine: VectorizedEngine,
        settings: Vectorized,
        is_asked_for: bool = False,
        allows_random: bool = False,
    ) -> None:
        self.trainer = trainer
        self.engine = engine
        self.is_asked_for = is_asked_for
        self.allows_random = allows_random
        convert = trainer.precision_plugin.convert_input
        self.grouping = Grouping(engine, settings, lambda: self.equal_work_only, convert)
        self.capture = LogCapture(trainer.lightning_module)
        self.task: ClientTask | None = None
        self.logs_may_wait = False
        """Whether logged values are not read before :meth:`flush_logs`."""
        self.watch = StepWatch(trainer, engine, self.capture)
        self._is_checked = False
        self._has_equal_steps = True
        self._seen_shapes: set[Any] = set()
        self._randomness = "error"
        self._loaders: list[Snapshot] = []
        self._reading_changes_loaders: bool | None = None
        self._has_told_of_splits = False

    @property
    def equal_work_only(self) -> bool:
        """Whether only clients with equal work may train together, because their steps share more than a shape."""
        kinds = set(self.grouping.memory.gradients.values())
        is_shared = self.trainer.accumulate_grad_batches > 1 or bool(internals.client_schedules(self.trainer))
        return is_shared or None in kinds or len(kinds) > 1

    def begin(self) -> None:
        """Called before the data of a group is read."""
        self.watch.begin()
        self._loaders = []

    def choose_steps(self, hook: str | None) -> None:
        """Called when a round has chosen the form of its steps.

        Args:
            hook: The hook because of which batches pass Lightning's hooks; None if they do not.
        """
        self.logs_may_wait = hook is None
        if hook is not None and self.engine.replays is not None:
            self.engine.replays.stop(f"batches pass Lightning's hooks because of {hook}", logging.WARNING)

    def note_loader(self, loader: Any) -> None:
        """Notes the state of a loader that is about to be read, in case it must be read again."""
        # Data sets may augment with their own generator, or count. Whether this one does is known once the first group
        # has been read; rows of tensors and batches in memory are read without the user's code.
        if self._reading_changes_loaders is not False and not isinstance(loader, LazyLoader | list | tuple):
            self._loaders.append(capture(loader, known=loader_generators(loader), values=False))

    def end_reading(self) -> None:
        """Called when the data of a group has been read."""
        if self._reading_changes_loaders is None and self._loaders:
            self._reading_changes_loaders = any(any(own.differences()) for own in self._loaders)

    def undo_reading(self) -> None:
        """Restores the loaders' states, because the clients' data will be read again."""
        for own in reversed(self._loaders):
            own.restore()
        self._loaders = []

    def tell_of_split(self, parts: Sequence[Sequence[Any]]) -> None:
        """Reports, once, that clients train alone because their batches can't be stacked."""
        if not self._has_told_of_splits and any(len(part) == 1 for part in parts):
            self._has_told_of_splits = True
            rank_zero_info("Clients whose batches differ in shape, and can't be stacked, train one after the other.")

    def start(self, task: ClientTask, data: StackedData) -> bool:
        """Called when the clients of a group have been loaded into the engine.

        Returns:
            Whether a step has been tried, so that the clients must be loaded again.

        Raises:
            NotVectorizable: If one step of the group would not do what a step of each client does; only the first
                group is checked.
        """
        self.task = task
        self._has_equal_steps = data.masks is None
        self.capture.clear()
        self.watch.start()
        if self._is_checked:
            return False
        obstacle = None if self.is_asked_for else self.watch.obstacle()
        if obstacle is not None:
            raise NotVectorizable(obstacle)
        # A copy: a training_step may change its batch in place.
        first = next(self.grouping.stacked(list(data.passes.values()), data.masks))
        self.select(first.mask)
        self._check(first)
        self._is_checked = True
        self.grouping.learn(is_tried=True)
        return True

    def _check(self, batch: StackedBatch) -> None:
        # Whether training together is worthwhile is decided once per run, by its first group, which a resumed run does
        # not see.
        is_judged = self.engine.device.type == "cpu" and not self.is_asked_for and not self.grouping.memory.is_tried
        max_flops = MAX_FLOPS_ON_CPU if is_judged else math.inf
        with self._in_step(batch) as (content, args), self._view():
            self._randomness = check_equivalence(
                self.engine, self.capture, self.watch, content, args, self.allows_random, max_flops
            )

    def _view(self) -> AbstractContextManager[None]:
        # If the user has requested the engine, steps may read the Trainer; the user must make sure that the values are
        # the same for all clients.
        return nullcontext() if self.is_asked_for else self.watch.view(self._has_equal_steps)

    def try_new_shapes(self, data: StackedData) -> bool:
        """Tries a step with each new shape of batch; returns whether :attr:`equal_work_only` has changed.

        A shape for which some parameters get no gradient must not share steps with one for which they do.
        """
        before = self.equal_work_only
        self.watch.begin_trial()
        for place, (batches, signatures) in enumerate(zip(data.passes.values(), data.works.values(), strict=True)):
            for batch, key in zip(batches, signatures, strict=True):
                if key in self._seen_shapes:
                    continue
                self._seen_shapes.add(key)
                shape = digest([key])
                if shape not in self.grouping.memory.gradients:
                    self.select((place,))
                    with self._in_step(self.grouping.stack([batch], (place,))) as (content, args):
                        names = params_with_gradients(self.engine, self.capture, content, args, self._randomness)
                    self.grouping.learn(gradients={shape: None if names is None else digest(names)})
        self.watch.end_trial()
        return self.equal_work_only != before

    def select(self, mask: Sequence[int]) -> None:
        """Lets the clients at the positions ``mask`` train in the next step."""
        assert self.task is not None
        self.engine.choose(mask)
        self.task.group.select(mask)

    @contextmanager
    def _in_step(self, batch: StackedBatch) -> Iterator[tuple[Any, tuple[Any, ...]]]:
        strategy = self.trainer.strategy
        content = strategy.batch_to_device(batch).content
        with strategy.precision_plugin.train_step_context():
            yield content, logged.step_arguments(self.trainer.lightning_module, 0)

    def halve(self, clients: Sequence[ClientId]) -> list[list[ClientId]]:
        """Splits a group whose step does not fit in a GPU's memory, and warns."""
        parts = self.grouping.halve(clients)
        rank_zero_info(
            f"A step of {len(clients)} clients does not fit in the GPU's memory; from here on at most {len(parts[0])} "
            "train together. Vectorized(clients_per_step=...) sets the limit from the start."
        )
        torch.cuda.empty_cache()  # the step's memory is in blocks of sizes that the next steps don't need
        return parts

    def leave(self) -> None:
        """Forgets the group, which has been trained or will not be trained together."""
        self.task, self._loaders = None, []

    def close(self) -> None:
        """Called at the end of the fit: frees the noted state of the module and the clients' logged values."""
        self.leave()
        self.watch.close()
        self.capture.clear()
        self.grouping.close()
        if self.engine.replays is not None:
            self.engine.replays.close()

    def undo(self) -> None:
        """Restores what the steps of a group have changed, because it is trained again client by client.

        Raises:
            ValueError: If that is not possible.
        """
        self.capture.clear()
        self.watch.restore()
        self.undo_reading()

    def refuse(self, reason: str, round: int = 0) -> None:
        """Reports why clients do not train together.

        Args:
            reason: The reason, as a sentence without a full stop.
            round: The round from which on they don't.

        Raises:
            MisconfigurationException: If the user has requested the vectorized engine.
        """
        self.leave()
        if self.is_asked_for:
            raise MisconfigurationException(
                f"engine='vectorized' can't train several clients in one step: {reason}. Change that, or let each "
                "client train alone with engine='sequential' ('auto' chooses)."
            )
        if len(self.trainer.strategy.active_driver.population) > 1:  # type: ignore[attr-defined]
            when = f" from round {round} on" if round else ""
            rank_zero_info(f"Clients train one after the other{when}: {reason}.")

    def step(self, batch: StackedBatch, *args: Any) -> tuple[Tensor, Tensor]:
        """Runs the step of all clients of the group that train on ``batch``.

        Returns:
            The sum of their losses, whose gradient is each client's own, and the losses, ``[num_clients]``.
        """
        self.select(batch.mask)
        content = batch.content
        losses, tensors = self._run(content, args)
        self._emit(batch, tensors)
        return losses.sum(), losses

    def _emit(self, batch: StackedBatch, tensors: list[Tensor], calls: LogCalls | None = None) -> None:
        size = logged.count_examples(part(batch.content, 0))
        self.capture.emit(tensors, torch.tensor(batch.mask), size, self.logs_may_wait, calls)

    def silent_step(self, batch: StackedBatch, *args: Any) -> tuple[Tensor, Tensor]:
        """As :meth:`step`, for the clients of the current step and without logging."""
        losses, _ = self._run(batch.content, args)
        return losses.sum(), losses

    # ---- steps that are replayed: :class:`~lightning_fl.engines.vectorized.step_replay.GroupStep`

    @property
    def version(self) -> Any:
        return self.watch.version, self.trainer.gradient_clip_val, self.trainer.gradient_clip_algorithm

    @property
    def obstacle(self) -> str | None:
        return self.watch.obstacle()

    def run_captured(self, content: Any) -> tuple[Tensor, list[Tensor], LogCalls]:
        module, hidden = self.capture.module, OpaqueProxy()
        args = [hidden for _ in logged.step_arguments(module, 0)]
        with trainer_replaced(module, hidden):
            losses, tensors = self.engine.forward_stacked(self.capture, content, *args, randomness=self._randomness)
        if hidden.is_seen:  # the step may have caught the error
            raise NotVectorizable("training_step looks at the Trainer or at batch_idx")
        return losses, tensors, self.capture.calls

    def emit_captured(self, batch: StackedBatch, tensors: list[Tensor], calls: LogCalls) -> None:
        self._emit(batch, tensors, calls)

    def flush_logs(self) -> None:
        """Passes the group's deferred logged values on to Lightning."""
        with internals.running_training_step(self.trainer.lightning_module):
            self.capture.flush()

    def _run(self, content: Any, args: tuple[Any, ...]) -> tuple[Tensor, list[Tensor]]:
        if self.is_asked_for:
            return self.engine.forward_stacked(self.capture, content, *args, randomness=self._randomness)
        leaves = [leaf for leaf in pytree.tree_leaves(content) if isinstance(leaf, Tensor)]
        versions = sum(map(version_counter, leaves))
        # Clients with unequal work are at different batches in one step.
        own = args if self._has_equal_steps else tuple(OpaqueProxy() for _ in args)
        with self._view():
            losses, tensors = self.engine.forward_stacked(self.capture, content, *own, randomness=self._randomness)
        if any(arg.is_seen for arg in own if isinstance(arg, OpaqueProxy)):
            raise NotVectorizable("training_step looks at batch_idx, which differs between the clients of a group")
        if sum(map(version_counter, leaves)) != versions:
            raise NotVectorizable("training_step changes its batch in place")
        return losses, tensors

    def check(self) -> None:
        """Called when the group has trained: checks that its steps had no side effects.

        Raises:
            NotVectorizable: If they had.
        """
        self.watch.check(draws=self._randomness != "error")

    def error_of(self, error: Exception) -> Exception:
        """The error to raise for an error in a step of several clients, if the user has requested such steps."""
        # `vmap` raises plain RuntimeErrors; only their text distinguishes them from the user's own.
        if not isinstance(error, NotVectorizable) and not any(word in str(error) for word in ("vmap", "functorch")):
            return error
        assert self.task is not None
        return MisconfigurationException(
            f"training_step can't run for {len(self.task.clients)} clients in one step, though it could at first: "
            f"{reason_of(error)}. Let each client train alone with FederatedStrategy(engine='sequential')."
        )

    def clip_norms(self, optimizer: torch.optim.Optimizer, max_norm: float) -> bool:
        """Clips each client's gradients by their norm; returns False if no group is being trained."""
        if self.task is not None:
            self.engine.clip_norms(optimizer, max_norm)
        return self.task is not None

    def restrict_to(self, accepted: Sequence[bool]) -> Mapping[str, Mapping[str, Any]]:
        """Repeats the updates of torchmetrics for the accepted clients only; returns their logged values."""
        chosen = torch.tensor(accepted)
        entries = self.capture.entries(chosen)
        self.capture.update_metrics(chosen)
        return entries
