"""Replays the steps of client groups: each shape of step is captured once, and checked against the step itself."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from lightning_fl.clients.local_work import BatchPosition
from lightning_fl.engines.capture import CapturedFunction, agree, capture, separate, unchanged_randomness
from lightning_fl.engines.optimizer_states import options_of
from lightning_fl.engines.vectorized.stacking import StackedBatch, signature
from lightning_fl.torch_internals import copy_tensors, pytree
from lightning_fl.types import Tree

log = logging.getLogger("lightning_fl.engines")

NUM_UNCAPTURED = 2
"""How often a shape of step is trained before it is captured: not every shape comes again."""
CHECKED = (0, 1, 32)
"""The replays of a shape that are compared with the step itself."""
MAX_CAPTURED = 32
"""Shapes that are captured; each holds the memory of a step."""


class GroupStep(Protocol):
    """What is needed of whoever runs the user's step for a client group."""

    @property
    def version(self) -> Any:
        """Differs if anything but tensors has changed that a step depends on."""

    @property
    def obstacle(self) -> str | None:
        """Why a change of what a step depends on could be missed."""

    def select(self, mask: Sequence[int]) -> None:
        """Lets the clients at the positions ``mask`` train in the next step."""

    def run_captured(self, content: Any) -> tuple[Tensor, list[Tensor], Any]:
        """The losses, the tensors that were logged, and what else there is to know of the calls that logged them.

        Raises:
            NotVectorizable: If the step looks at what may differ in the next one.
        """

    def emit_captured(self, batch: StackedBatch, tensors: list[Tensor], calls: Any) -> None:
        """Logs what :meth:`run_captured` would have logged, with other tensors."""


@dataclass
class CapturedStep:
    """A shape of step that has been captured.

    Args:
        function: Replays it.
        calls: The calls that logged something.
        options: The optimizer's options at the time if its step is part of the replay; else None.
        num_logged: How many tensors were logged.
        grads: Names of the parameters that get a gradient.
        num_replays: How often it has been replayed.
    """

    function: CapturedFunction
    calls: Any
    options: Any
    num_logged: int
    grads: list[str]
    num_replays: int = field(default=0)


class StepReplays:
    """Captures the steps of an engine's client groups, and replays them.

    Forward and backward pass are captured. So are the algorithm's correction of the gradients, clipping and the
    optimizer's step where every step does the same operations: SGD whose momentum has begun, or another optimizer with
    ``capturable=True``, as long as its options stay what they are; elsewhere these run by themselves. Whatever can't be
    captured is trained as if there were no replays, and a line of level DEBUG says why.

    Args:
        engine: Trains the groups.
        group_step: Runs the user's step.
    """

    def __init__(self, engine: Any, group_step: GroupStep) -> None:
        self.engine = engine
        self.group_step = group_step
        self.num_replays = 0
        """Steps that were trained by a replay."""
        self.reason: str | None = None
        """Why no steps are replayed any more."""
        self._captured: dict[Any, CapturedStep] = {}
        self._seen: Counter[Any] = Counter()
        self._version: Any = None
        self._options_change = False
        self._last_context: tuple[Any, Any] = (None, None)
        self._pool: Any = None

    def step(self, batch: StackedBatch, position: BatchPosition) -> Tensor | None:
        """Trains on a batch by a replay.

        Returns:
            The loss of each client, ``[num_clients]``; None if nothing was done, because this step can't be replayed.
        """
        if self.reason is not None:
            return None
        if not (position.starts_window and position.ends_window) or self.engine.functions.unscale is not None:
            self.stop("gradients accumulate over several batches or are scaled")
            return None
        self.group_step.select(batch.mask)
        try:
            step = self._find(batch)
            if step is None:
                return None
            tensors = self._tensors(batch.content, step.options is not None)
            if step.num_replays in CHECKED and not self._is_right(step, batch, tensors):
                self.stop("a replay differs from the step itself", logging.WARNING)
                return None
            outputs = step.function(tensors)
        except Exception as error:  # capturing fails in many ways; a fault of the user's is raised again by the step
            self.stop(f"{type(error).__name__}: {error}")
            return None
        return self._finish(step, batch, position, tensors, outputs)

    def _find(self, batch: StackedBatch) -> CapturedStep | None:
        """The captured step for a batch, captured now if it is time to."""
        version = self.group_step.version
        if version != self._version:
            self._captured, self._version = {}, version
        optimizer = self._optimizer
        is_known = self.engine.grad_transform is None or self._context is not None
        steps = is_known and not self._options_change and _repeats_itself(optimizer)
        of_context = self._context_signature() if steps else None
        key = signature(batch.content), len(batch.mask), *self.engine.stacked_params, steps, of_context
        step = self._captured.get(key)
        if step is not None and steps and step.options != options_of(optimizer):
            log.debug("Options of the optimizer change, so that its steps are not replayed.")
            self._options_change, self._captured = True, {}
            return None
        if step is None:
            self._seen[key] += 1
            if self._seen[key] <= NUM_UNCAPTURED or len(self._captured) == MAX_CAPTURED:
                return None
            step = self._captured[key] = self._capture(batch.content, steps)
        return step

    def _capture(self, content: Any, steps: bool) -> CapturedStep:
        if self.group_step.obstacle is not None:
            raise RuntimeError(self.group_step.obstacle)
        tensors = self._tensors(content, steps)
        if self._pool is None and tensors[0].is_cuda:
            self._pool = torch.cuda.graph_pool_handle()
        found: list[Any] = []

        def function() -> list[Tensor]:
            outputs, *found[:] = self._run(content, steps)
            return outputs

        captured = capture(function, tensors, self._pool)
        log.debug(
            "Captured a step of %d clients, %s their optimizer's.",
            self.engine.num_clients,
            "with" if steps else "without",
        )
        return CapturedStep(captured, found[0], options_of(self._optimizer) if steps else None, *found[1:])

    def _run(self, content: Any, steps: bool) -> tuple[list[Tensor], Any, int, list[str]]:
        """The step itself; returns its tensors, the calls that logged, and how many of the tensors are which."""
        engine, optimizer = self.engine, self._optimizer
        with engine.buffers_kept(), torch.enable_grad():
            with engine.functions.context():
                losses, logged, calls = self.group_step.run_captured(content)
            grads = engine.gradients(losses.sum())
            buffers = engine.stacked_buffers
        if steps:
            with engine.optimizers.not_counting(), torch.no_grad():
                self._set_gradients(grads)
                engine.apply_gradients(optimizer)
                self._set_gradients({})
            grads = {}
        # Detached also where they are inputs, whose memory is another after the capture.
        outputs = [tensor.detach() for tensor in (losses, *logged, *buffers.values(), *grads.values())]
        return outputs, calls, len(logged), list(grads)

    def _is_right(self, step: CapturedStep, batch: StackedBatch, tensors: list[Tensor]) -> bool:
        """Compares a replay with the step itself; leaves nothing changed."""
        steps, device = step.options is not None, tensors[0].device
        changed = self._changed(steps)
        with separate(tensors) as copies, unchanged_randomness(device):
            expected, calls, *_ = self._run(batch.content, steps)
        with unchanged_randomness(device):
            found = step.function(tensors)
        before = [tensor.detach() for tensor in tensors[:changed]]
        return (
            calls == step.calls
            and len(found) == len(expected)
            and all(map(agree, found, expected))
            and all(map(agree, step.function.inputs[:changed], copies[:changed], before))
        )

    def _finish(
        self,
        step: CapturedStep,
        batch: StackedBatch,
        position: BatchPosition,
        tensors: list[Tensor],
        outputs: list[Tensor],
    ) -> Tensor:
        engine, optimizer = self.engine, self._optimizer
        engine.batch = batch, position.offset
        step.num_replays += 1
        self.num_replays += 1
        # Cloned, because the next replay writes to the same memory; gradients are used up by then.
        losses, *rest = outputs
        logged = [own.clone() for own in rest[: step.num_logged]]
        rest = rest[step.num_logged :]
        names = list(engine.stacked_buffers)
        engine.stacked_buffers = {name: own.clone() for name, own in zip(names, rest, strict=False)}
        if step.options is not None:
            changed = self._changed(steps=True)
            copy_tensors([own.detach() for own in tensors[:changed]], step.function.inputs[:changed])
            engine.optimizers.count(0, optimizer)
        else:
            self._set_gradients(dict(zip(step.grads, rest[len(names) :], strict=True)))
            engine.apply_gradients(optimizer)
        self.group_step.emit_captured(batch, logged, step.calls)
        return losses.clone()

    def _tensors(self, content: Any, steps: bool) -> list[Tensor]:
        """What a step reads and writes; first come those that it changes in place."""
        states = _states(self._optimizer) if steps else []
        read = (content, self._context) if steps else content
        leaves = [leaf for leaf in pytree.tree_leaves(read) if isinstance(leaf, Tensor)]
        return [*self.engine.stacked_params.values(), *states, *self.engine.stacked_buffers.values(), *leaves]

    @property
    def _context(self) -> Any:
        """What the algorithm's correction of gradients reads beside them; None if it is unknown or there is none."""
        return getattr(self.engine.grad_transform, "context", None)

    def _context_signature(self) -> Any:
        context = self._context
        # Found once for each selection of clients: it takes long, and the context is the same object until the next.
        if context is not self._last_context[0]:
            self._last_context = context, signature(context)
        return self._last_context[1]

    def _changed(self, steps: bool) -> int:
        return len(self.engine.stacked_params) + len(_states(self._optimizer)) if steps else 0

    def _set_gradients(self, grads: Tree) -> None:
        for name, param in self.engine.stacked_params.items():
            param.grad = grads.get(name)

    @property
    def _optimizer(self) -> Optimizer:
        (optimizer,) = self.engine.optimizers.optimizers
        return optimizer

    def stop(self, reason: str, level: int = logging.DEBUG) -> None:
        """Replays no more steps, and says why, once."""
        if self.reason is None:
            log.log(level, "Steps are not replayed: %s.", reason)
        self.reason, self._captured = reason, {}

    def close(self) -> None:
        """Lets go of all that has been captured."""
        self._captured, self._last_context = {}, (None, None)


def _states(optimizer: Optimizer) -> list[Tensor]:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    return [value for param in params for value in optimizer.state.get(param, {}).values() if isinstance(value, Tensor)]


def _repeats_itself(optimizer: Optimizer) -> bool:
    """Whether the optimizer's next step and all later ones with the same options are the same operations on tensors."""
    groups = optimizer.param_groups
    if type(optimizer) is not SGD:
        has_begun = all(optimizer.state.get(param) for group in groups for param in group["params"])
        return has_begun and all(group.get("capturable") for group in groups)
    if any(isinstance(group["lr"], Tensor) or group.get("fused") for group in groups):
        return False
    momenta = [param for group in groups if group["momentum"] for param in group["params"]]
    return all(optimizer.state.get(param, {}).get("momentum_buffer") is not None for param in momenta)
