"""Replays the steps of client groups: each run of equal steps is captured once, and checked against the steps."""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby, islice
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from lightning_fl.clients.local_work import BatchPosition
from lightning_fl.engines.capture import CapturedFunction, agree, capture, separate, unchanged_randomness
from lightning_fl.engines.optimizer_states import options_of
from lightning_fl.engines.vectorized.stacking import StackedBatch, signature
from lightning_fl.torch_internals import copy_tensors, pytree
from lightning_fl.tree import num_bytes
from lightning_fl.types import Tree

log = logging.getLogger("lightning_fl.engines")

NUM_UNCAPTURED = 2
"""How often a run of steps is trained before it is captured: not every run comes again."""
CHECKED = (0, 1, 32)
"""The replays of a run that are compared with the steps themselves."""
MAX_CAPTURED = 32
"""Runs that are captured; each holds the memory of a step, and its batches."""
MAX_STEPS = 64
"""Steps of a run: all of them are in the graph."""
MAX_BYTES = 2**25
"""Of the batches of a run."""


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
class CapturedRun:
    """Steps of one shape that follow each other, captured together.

    Args:
        function: Replays them.
        calls: The calls in each step that logged something, and how many tensors they logged.
        options: The optimizer's options at the time if its steps are part of the replay; else None.
        grads: Names of the parameters that get a gradient, if the optimizer's step is not part of it.
        num_replays: How often it has been replayed.
    """

    function: CapturedFunction
    calls: list[tuple[Any, int]]
    options: Any
    grads: list[str]
    num_replays: int = field(default=0)


class StepReplays:
    """Captures the steps of an engine's client groups, and replays them.

    Forward and backward pass are captured. So are the algorithm's correction of the gradients, clipping and the
    optimizer's step where every step does the same operations: SGD whose momentum has begun, or another optimizer with
    ``capturable=True``, as long as its options stay what they are; elsewhere these run by themselves. Steps that follow
    each other with the same clients and shapes are then captured as one run: the first of them replays all, and the
    others only log what they would have logged. Whatever can't be captured is trained as if there were no replays, and
    a line of level DEBUG says why.

    Args:
        engine: Trains the groups.
        group_step: Runs the user's step.
    """

    def __init__(self, engine: Any, group_step: GroupStep) -> None:
        self.engine = engine
        self.group_step = group_step
        self.num_replays = 0
        """Steps that were trained by a replay."""
        self.num_launches = 0
        """Replays; one may train several steps."""
        self.reason: str | None = None
        """Why no steps are replayed any more."""
        self._captured: dict[Any, CapturedRun] = {}
        self._seen: Counter[Any] = Counter()
        self._version: Any = None
        self._options_change = False
        self._last_context: tuple[Any, Any] = (None, None)
        self._pool: Any = None
        self._ahead: deque[tuple[Tensor, list[Tensor], Any]] = deque()
        """Of steps that have been replayed and not yet asked for: losses, logged tensors, and the calls that logged."""

    def read_ahead(self, batches: Iterable[StackedBatch]) -> Iterator[StackedBatch]:
        """The same batches; the first of those that may be replayed as one run has the others as its ``following``."""
        optimizers = self.engine.optimizers
        if self.reason is not None or optimizers.schedules or not _is_capturable(self._optimizer):
            yield from batches
            return
        # A state that the first step makes is no input of that step.
        has_begun = not optimizers.num_steps_apart
        for _, alike in groupby(batches, lambda batch: (batch.mask, signature(batch.content))):
            for batch in alike:
                most = min(MAX_STEPS, MAX_BYTES // max(1, _num_bytes(batch))) if has_begun else 1
                batch.following = [own.to(self.engine.device) for own in islice(alike, max(0, most - 1))]
                has_begun = True
                yield batch
                yield from batch.following

    def step(self, batch: StackedBatch, position: BatchPosition) -> Tensor | None:
        """Trains on a batch by a replay.

        Returns:
            The loss of each client, ``[num_clients]``; None if nothing was done, because this step can't be replayed.
        """
        self.engine.batch = batch, position.offset
        if not self._ahead and not self._replay(batch, position):
            return None
        losses, logged, calls = self._ahead.popleft()
        self.group_step.emit_captured(batch, logged, calls)
        return losses

    def _replay(self, batch: StackedBatch, position: BatchPosition) -> bool:
        """Replays the run that begins with a batch, or its step alone; returns False if neither is possible."""
        if self.reason is not None:
            return False
        if position.window != 1 or self.engine.functions.unscale is not None:
            self.stop("gradients accumulate over several batches or are scaled")
            return False
        self.group_step.select(batch.mask)
        try:
            run = [batch, *batch.following]
            captured = self._find(run)
            if captured is None and batch.following:
                run = [batch]
                captured = self._find(run)
            if captured is None:
                return False
            tensors = self._tensors(run, captured.options is not None)
            if captured.num_replays in CHECKED and not self._is_right(captured, run, tensors):
                self.stop("a replay differs from the step itself", logging.WARNING)
                return False
            outputs = captured.function(tensors)
        except Exception as error:  # capturing fails in many ways; a fault of the user's is raised again by the step
            self.stop(f"{type(error).__name__}: {error}")
            return False
        self._finish(captured, tensors, outputs)
        return True

    def _find(self, run: Sequence[StackedBatch]) -> CapturedRun | None:
        """The captured run for batches, captured now if it is time to."""
        version = self.group_step.version
        if version != self._version:
            self._captured, self._version = {}, version
        optimizer = self._optimizer
        is_known = self.engine.grad_transform is None or self._context is not None
        steps = is_known and not self._options_change and _repeats_itself(optimizer)
        if len(run) > 1 and not steps:
            return None
        of_context = self._context_signature() if steps else None
        of_batch = signature(run[0].content), len(run[0].mask)
        key = of_batch, len(run), *self.engine.stacked_params, steps, of_context
        captured = self._captured.get(key)
        if captured is not None and steps and captured.options != options_of(optimizer):
            log.debug("Options of the optimizer change, so that its steps are not replayed.")
            self._options_change, self._captured = True, {}
            return None
        if captured is None:
            self._seen[key] += 1
            if self._seen[key] <= NUM_UNCAPTURED or len(self._captured) == MAX_CAPTURED:
                return None
            captured = self._captured[key] = self._capture(run, steps)
        return captured

    def _capture(self, run: Sequence[StackedBatch], steps: bool) -> CapturedRun:
        if self.group_step.obstacle is not None:
            raise RuntimeError(self.group_step.obstacle)
        tensors = self._tensors(run, steps)
        if self._pool is None and tensors[0].is_cuda:
            self._pool = torch.cuda.graph_pool_handle()
        found: list[Any] = []

        def function() -> list[Tensor]:
            outputs, *found[:] = self._run(run, steps)
            return outputs

        captured = capture(function, tensors, self._pool)
        log.debug(
            "Captured %s of %d clients, %s their optimizer's.",
            "a step" if len(run) == 1 else f"{len(run)} steps",
            self.engine.num_clients,
            "with" if steps else "without",
        )
        calls, grads = found
        return CapturedRun(captured, calls, options_of(self._optimizer) if steps else None, grads)

    def _run(self, run: Sequence[StackedBatch], steps: bool) -> tuple[list[Tensor], list[tuple[Any, int]], list[str]]:
        """The steps themselves; returns their tensors, the calls that logged, and names of the gradients among them."""
        engine, optimizer = self.engine, self._optimizer
        outputs: list[Tensor] = []
        made = []
        grads: Tree = {}
        with engine.buffers_kept():
            for batch in run:
                with torch.enable_grad():
                    with engine.functions.context():
                        losses, logged, calls = self.group_step.run_captured(batch.content)
                    grads = engine.gradients(losses.sum())
                outputs += [losses, *logged]
                made.append((calls, len(logged)))
                if steps:
                    with engine.optimizers.not_counting(), torch.no_grad():
                        self._set_gradients(grads)
                        engine.apply_gradients(optimizer)
                        self._set_gradients({})
                    grads = {}
            buffers = engine.stacked_buffers
        # Detached also where they are inputs, whose memory is another after the capture.
        outputs = [tensor.detach() for tensor in (*outputs, *buffers.values(), *grads.values())]
        return outputs, made, list(grads)

    def _is_right(self, captured: CapturedRun, run: Sequence[StackedBatch], tensors: list[Tensor]) -> bool:
        """Compares a replay with the steps themselves; leaves nothing changed."""
        steps, device = captured.options is not None, tensors[0].device
        changed = self._changed(steps)
        with separate(tensors) as copies, unchanged_randomness(device):
            expected, calls, _ = self._run(run, steps)
        with unchanged_randomness(device):
            found = captured.function(tensors)
        before = [tensor.detach() for tensor in tensors[:changed]]
        return (
            calls == captured.calls
            and len(found) == len(expected)
            and all(map(agree, found, expected))
            and all(map(agree, captured.function.inputs[:changed], copies[:changed], before))
        )

    def _finish(self, captured: CapturedRun, tensors: list[Tensor], outputs: list[Tensor]) -> None:
        """Takes over what a replay has computed."""
        engine, optimizer = self.engine, self._optimizer
        captured.num_replays += 1
        self.num_replays += len(captured.calls)
        self.num_launches += 1
        # Copied, because the next replay writes to the same memory; gradients are used up by then.
        num_kept, names = len(outputs) - len(captured.grads), list(engine.stacked_buffers)
        kept = [torch.empty_like(output) for output in outputs[:num_kept]]
        copy_tensors(kept, outputs[:num_kept])
        own = iter(kept)
        self._ahead.extend((next(own), [*islice(own, num)], calls) for calls, num in captured.calls)
        engine.stacked_buffers = dict(zip(names, own, strict=True))
        if captured.options is None:
            self._set_gradients(dict(zip(captured.grads, outputs[num_kept:], strict=True)))
            engine.apply_gradients(optimizer)
            return
        changed = self._changed(steps=True)
        copy_tensors([tensor.detach() for tensor in tensors[:changed]], captured.function.inputs[:changed])
        for _ in captured.calls:
            engine.optimizers.count(0, optimizer)

    def _tensors(self, run: Sequence[StackedBatch], steps: bool) -> list[Tensor]:
        """What a run reads and writes; first come those that it changes in place."""
        states = _states(self._optimizer) if steps else []
        contents = [batch.content for batch in run]
        read = (contents, self._context) if steps else contents
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

    def leave(self) -> None:
        """Forgets the steps of a group, which may have been given up between them."""
        self._ahead.clear()

    def close(self) -> None:
        """Lets go of all that has been captured."""
        self._captured, self._last_context = {}, (None, None)


def _states(optimizer: Optimizer) -> list[Tensor]:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    return [value for param in params for value in optimizer.state.get(param, {}).values() if isinstance(value, Tensor)]


def _num_bytes(batch: StackedBatch) -> int:
    return num_bytes(leaf for leaf in pytree.tree_leaves(batch.content) if isinstance(leaf, Tensor))


def _is_capturable(optimizer: Optimizer) -> bool:
    """Whether the optimizer's steps, once it has a state, do the same operations as long as its options stay."""
    groups = optimizer.param_groups
    if type(optimizer) is not SGD:
        return all(group.get("capturable") for group in groups)
    return not any(isinstance(group["lr"], Tensor) or group.get("fused") for group in groups)


def _repeats_itself(optimizer: Optimizer) -> bool:
    """Whether the optimizer's next step and all later ones with the same options are the same operations on tensors."""
    groups = optimizer.param_groups
    if type(optimizer) is SGD:
        momenta = [param for group in groups if group["momentum"] for param in group["params"]]
        has_begun = all(optimizer.state.get(param, {}).get("momentum_buffer") is not None for param in momenta)
    else:
        has_begun = all(optimizer.state.get(param) for group in groups for param in group["params"])
    return has_begun and _is_capturable(optimizer)
