"""Steps of clients that train together, replayed without the user's Python while nothing it depends on has changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_debug, rank_zero_warn
from torch import Tensor

from lightning_fl.engines import VectorizedEngine
from lightning_fl.engines.vectorized.stacking import signature
from lightning_fl.engines.vectorized.tracing import TracedStep
from lightning_fl.strategies.internals import trainer_replaced
from lightning_fl.strategies.vectorized.guards import Guards
from lightning_fl.strategies.vectorized.log_capture import LogCapture, NotVectorizable
from lightning_fl.types import Tree

Outcome = tuple[Tensor, Tensor, list[Tensor]]
Step = Callable[[Any, tuple[Any, ...]], Outcome]

MAX_RECORDINGS = 16
MAX_CHANGES = 3
FEW = 8
USES, USES_BY_FEW = 2, 32
"""TracedStep takes as long as tens of steps; shapes of steps of few, or of some of the clients, seldom come again."""


class OpaqueProxy:
    """Stands for the Trainer or the batch index while a step is recorded; it can be handed on but not looked at."""

    is_seen = False

    def _look(self, *args: Any, **kwargs: Any) -> NoReturn:
        object.__setattr__(self, "is_seen", True)
        raise NotVectorizable("it looks at the Trainer or at batch_idx")

    __getattr__ = __bool__ = __hash__ = __str__ = __repr__ = __format__ = __index__ = __int__ = __float__ = _look
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _look
    __add__ = __sub__ = __mul__ = __truediv__ = __floordiv__ = __mod__ = __pow__ = _look
    __radd__ = __rsub__ = __rmul__ = __rtruediv__ = __rfloordiv__ = __rmod__ = __rpow__ = _look


def with_grads(
    engine: VectorizedEngine, capture: LogCapture, batch: Any, args: tuple[Any, ...], randomness: str
) -> frozenset[str] | None:
    """The parameters that get a gradient in a step of several clients; leaves nothing changed.

    Returns:
        None if the step looks at the Trainer or at ``batch_idx``, so that it may be another one the next time.
    """
    stand_in, buffers = OpaqueProxy(), engine.copy_buffers()
    try:
        with (
            trainer_replaced(capture.module, stand_in),
            torch.random.fork_rng(enabled=randomness != "error"),
            torch.enable_grad(),
        ):
            losses, _ = engine.forward_stacked(capture, batch, *[stand_in] * len(args), randomness=randomness)
            names = frozenset(engine.gradients(losses.sum()))
    except Exception:
        return None
    finally:
        engine.put_buffers(buffers)
        capture.clear()
    return None if stand_in.is_seen else names


class StepCache:
    """Records a step when batches of its shapes come again, and replays it from then on.

    That is the second time, or the 32nd where few clients train in a step.

    Args:
        engine: Runs the steps.
        capture: Notes what they log.
        compile: Whether ``torch.compile`` makes recordings faster.
    """

    def __init__(self, engine: VectorizedEngine, capture: LogCapture, compile: bool = False) -> None:
        self.engine = engine
        self.capture = capture
        self.compile = compile
        self._recordings: dict[Any, TracedStep] = {}
        self._calls: dict[Any, list[Any]] = {}
        self._times: Counter[Any] = Counter()
        self._surroundings: Guards | None = None
        self._layout: Any = None
        self._num_changes = -1
        self._is_recordable = True

    def start(self) -> None:
        """Other clients begin; forgets the recordings if what the step can read has changed since."""
        if not self._is_recordable:
            return
        try:
            now = Guards(self.capture.module)
        except NotVectorizable as error:
            self._run_each_time(str(error))
            return
        layout = self.engine.layout
        if now.differ(self._surroundings) or layout != self._layout:
            self._num_changes += 1
            if self._num_changes > MAX_CHANGES:
                self._run_each_time("what it reads keeps changing")
            self._recordings.clear()
            self._times.clear()
        self._surroundings, self._layout = now, layout

    def __call__(self, batch: Any, args: tuple[Any, ...], randomness: str, step: Step) -> Outcome:
        """One step of all clients.

        Args:
            batch: Their batches, stacked.
            args: The other arguments of ``training_step``.
            randomness: Of ``torch.func.vmap``.
            step: Runs it with the user's Python.

        Returns:
            The sum of the losses, the losses, and the tensors that the step logs.
        """
        key = signature(batch), self.engine.is_gathered
        if key in self._recordings:
            self.capture.repeat(self._calls[key])
            return self.engine.replay(self._recordings[key], batch)
        self._times[key] += 1
        uses = USES_BY_FEW if self.engine.is_gathered or self.engine.num_clients < FEW else USES
        if not self._is_recordable or self._times[key] != uses or len(self._recordings) == MAX_RECORDINGS:
            return step(batch, args)
        try:
            recording, losses, grads = self._record(batch, args, randomness)
        except Exception as error:
            self._run_each_time(str(error))
            return step(batch, args)
        outcome = step(batch, args)
        if randomness != "error" or self._agree(losses, grads, outcome):
            self._recordings[key], self._calls[key] = recording, self.capture.calls
        else:
            self._run_each_time("recorded it gives other values")
        return outcome

    def _run_each_time(self, reason: str) -> None:
        if not self._is_recordable:
            return
        self._is_recordable = False
        self._surroundings = None
        self._recordings.clear()
        self._calls.clear()
        if self.compile:
            rank_zero_warn(f"Vectorized(compile=True) has no effect, since training_step can't be recorded: {reason}.")
        else:
            rank_zero_debug(f"training_step is run at each step: {reason}")

    def _record(self, batch: Any, args: tuple[Any, ...], randomness: str) -> tuple[TracedStep, Tensor, Tree]:
        if torch.is_autocast_enabled(self.engine.device.type):
            raise NotVectorizable("a recorded step has no autocast")
        if torch.is_anomaly_enabled():
            raise NotVectorizable("a recorded step has no autograd in which anomalies could be detected")
        stand_in = OpaqueProxy()
        with trainer_replaced(self.capture.module, stand_in):
            stand_ins = [stand_in] * len(args)
            recording = self.engine.record(self.capture, batch, *stand_ins, randomness=randomness, compile=self.compile)
        if stand_in.is_seen:
            stand_in._look()
        if Guards(self.capture.module).differ(self._surroundings):
            raise NotVectorizable("it changes what it can read")
        if self.capture.logs_numbers:
            raise NotVectorizable("it logs a number that is no tensor, which may be another one the next time")
        return recording, *self.engine.try_out(recording, batch)

    def _agree(self, losses: Tensor, grads: Tree, outcome: Outcome) -> bool:
        loss, own_losses, _ = outcome
        own = self.engine.gradients(loss, keep=True)
        if own.keys() != grads.keys():
            return False
        pairs = [(losses, own_losses), *((grads[name], own[name]) for name in own)]
        return all(torch.allclose(a, b, rtol=1e-4, equal_nan=True) for a, b in pairs)
