"""Runs the steps of client groups inside Lightning: one batch of the loop is a batch of each client of the group."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from lightning_fl.engines import Vectorized, VectorizedEngine
from lightning_fl.engines.vectorized.grouping import Grouping
from lightning_fl.engines.vectorized.stacking import StackedBatch, part
from lightning_fl.federation import ClientTask
from lightning_fl.federation.group_data import StackedData
from lightning_fl.strategies import internals
from lightning_fl.strategies import results as logged
from lightning_fl.strategies.vectorized.compatibility import MAX_FLOPS_ON_CPU, check_equivalence, params_with_gradients
from lightning_fl.strategies.vectorized.log_capture import LogCapture, NotVectorizable
from lightning_fl.strategies.vectorized.side_effects import (
    check_unchanged,
    check_undrawn,
    own_attributes,
    random_states,
)


class VectorizedDriver:
    """Runs the steps of client groups, and logs what they log.

    Args:
        trainer: The Trainer.
        engine: Trains the groups.
        settings: How many clients train together.
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
        """Whether nobody looks at what is logged before :meth:`flush_logs`."""
        self._is_checked = False
        self._has_stepped = False
        self._grads_of: dict[Any, frozenset[str] | None] = {}
        self._randomness = "error"

    @property
    def equal_work_only(self) -> bool:
        """Whether only clients with equal work may train together, because their steps share more than a shape."""
        kinds = set(self._grads_of.values())
        is_shared = self.trainer.accumulate_grad_batches > 1 or bool(internals.client_schedules(self.trainer))
        return is_shared or None in kinds or len(kinds) > 1

    def start(self, task: ClientTask, data: StackedData) -> None:
        """Called when the clients of a group have been loaded into the engine.

        Raises:
            NotVectorizable: If one step of the group would not do what a step of each client does; only the first
                group is checked.
        """
        self.task = task
        self._has_stepped = False
        self.capture.clear()
        if not self._is_checked:
            # A copy of its own: a training_step may change its batch in place.
            first = next(self.grouping.stacked(list(data.passes.values()), data.masks))
            self._select(first.mask)
            self._check(first)
            self._is_checked = True

    def _check(self, batch: StackedBatch) -> None:
        is_cpu = self.engine.device.type == "cpu"
        max_flops = MAX_FLOPS_ON_CPU if is_cpu and not self.is_asked_for else math.inf
        with self._in_step(batch) as (content, args):
            self._randomness = check_equivalence(
                self.engine, self.capture, content, args, self.allows_random, max_flops
            )

    def try_new_shapes(self, data: StackedData) -> bool:
        """Tries a step with each new shape of batch; returns whether :attr:`equal_work_only` has changed.

        A shape for which some parameters get no gradient must not share steps with one for which they do.
        """
        before = self.equal_work_only
        for place, (batches, signatures) in enumerate(zip(data.passes.values(), data.works.values(), strict=True)):
            for batch, key in zip(batches, signatures, strict=True):
                if key not in self._grads_of:
                    self._select((place,))
                    with self._in_step(self.grouping.stack([batch], (place,))) as (content, args):
                        self._grads_of[key] = params_with_gradients(
                            self.engine, self.capture, content, args, self._randomness
                        )
        return self.equal_work_only != before

    def _select(self, mask: Sequence[int]) -> None:
        assert self.task is not None
        self.engine.choose(mask)
        self.task.group.select(mask)

    @contextmanager
    def _in_step(self, batch: StackedBatch) -> Iterator[tuple[Any, tuple[Any, ...]]]:
        strategy = self.trainer.strategy
        content = strategy.batch_to_device(batch).content
        with strategy.precision_plugin.train_step_context():
            yield content, logged.step_arguments(self.trainer.lightning_module, 0)

    def leave(self) -> None:
        """Forgets the group, which has been trained or will not be trained together."""
        self.task = None

    def refuse(self, reason: str) -> None:
        """Reports why clients do not train together.

        Raises:
            MisconfigurationException: If the user has requested that they do.
        """
        self.leave()
        if self.is_asked_for:
            raise MisconfigurationException(
                f"engine='vectorized' can't train several clients in one step: {reason}. Change that, or let each "
                "client train alone with engine='sequential' ('auto' chooses)."
            )
        if len(self.trainer.strategy.active_driver.population) > 1:  # type: ignore[attr-defined]
            rank_zero_info(f"Clients train one after the other: {reason}.")

    def step(self, batch: StackedBatch, *args: Any) -> tuple[Tensor, Tensor]:
        """Runs the step of all clients of the group that train on ``batch``.

        Returns:
            The sum of their losses, whose gradient is each client's own, and the losses, ``[num_clients]``.
        """
        self._select(batch.mask)
        content = batch.content
        losses, tensors = self._run(content, args)
        if self.capture.has_calls:
            places, size = torch.tensor(batch.mask), logged.count_examples(part(content, 0))
            self.capture.emit(tensors, places, size, self.logs_may_wait)
        return losses.sum(), losses

    def flush_logs(self) -> None:
        """Passes the group's logged values that were held back on to Lightning."""
        with internals.running_training_step(self.trainer.lightning_module):
            self.capture.flush()

    def _run(self, content: Any, args: tuple[Any, ...]) -> tuple[Tensor, list[Tensor]]:
        module = self.capture.module
        before, drawn = own_attributes(module), None if self._has_stepped else random_states()
        self._has_stepped = True
        try:
            losses, tensors = self.engine.forward_stacked(self.capture, content, *args, randomness=self._randomness)
            check_unchanged(before, own_attributes(module))
            if drawn is not None:  # in a group's first step only: reading the generators takes as long as a layer
                check_undrawn(drawn)
        except (NotVectorizable, RuntimeError) as error:
            # `vmap` raises plain RuntimeErrors; only their text tells them from the user's own.
            if not isinstance(error, NotVectorizable) and not any(word in str(error) for word in ("vmap", "functorch")):
                raise
            assert self.task is not None
            raise MisconfigurationException(
                f"training_step can't run for {len(self.task.clients)} clients in one step, though it could at first: "
                f"{error}. Let each client train alone with FederatedStrategy(engine='sequential')."
            ) from error
        return losses, tensors

    def clip_norms(self, optimizer: torch.optim.Optimizer, max_norm: float) -> bool:
        """Clips each client's gradients by their norm; returns False if no group is being trained."""
        if self.task is not None:
            self.engine.clip_norms(optimizer, max_norm)
        return self.task is not None

    def restrict_to(self, accepted: Sequence[bool]) -> Mapping[str, Mapping[str, Any]]:
        """Repeats the updates of torchmetrics for the accepted clients only; returns the values that these logged."""
        chosen = torch.tensor(accepted)
        entries = self.capture.entries(chosen)
        self.capture.update_metrics(chosen)
        return entries
