"""Checks what a training step of several clients reads and changes.

The user's Python code runs once in a step of several clients. The result is the same as in a step of each client if the
code is a function of the clients' tensors and of values that are the same for all of them: it must change nothing, draw
no random numbers, and read only values of the Trainer that do not depend on the client.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import lightning as L
import numpy as np
import torch
from torch import nn

from lightning_fl.engines import VectorizedEngine
from lightning_fl.engines.module_state import Snapshot, capture
from lightning_fl.engines.vectorized.stacking import NotVectorizable
from lightning_fl.strategies.internals import trainer_replaced
from lightning_fl.strategies.vectorized.log_capture import LogCapture
from lightning_fl.torch_internals import RECURRENT_COPIES, has_global_hooks, version_counter

_OF_LIGHTNING = vars(L.LightningModule()).keys() - vars(nn.Module()).keys()
"""Attributes with which Lightning keeps its own state on a module."""
_NOT_IN_STEPS = {"__init__", "prepare_data", "setup"} | {
    name for name in dir(L.LightningModule) if name.startswith(("on_", "configure_")) or name.endswith("_dataloader")
}
"""Methods that run outside steps; the objects they use, such as data, are ignored."""
SAME_FOR_ALL_CLIENTS = {
    *("current_epoch", "max_epochs", "min_epochs", "max_steps", "min_steps", "max_time", "estimated_stepping_batches"),
    *("world_size", "global_rank", "local_rank", "node_rank", "num_nodes", "num_devices", "is_global_zero"),
    *("training", "validating", "testing", "predicting", "evaluating", "sanity_checking", "precision", "barebones"),
    *("accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm", "log_every_n_steps", "fast_dev_run"),
}
"""Attributes of the Trainer that a step may read."""
TAKES_DRAWS_BACK = {"setstate", "set_state", "set_rng_state", "fork_rng", "isolate_rng", "set_bit_generator"}
"""Functions that can hide a draw from a random generator."""
SAME_IN_EQUAL_STEPS = {"global_step"}
"""Further attributes that it may read if all clients of a group are at the same step."""


class OpaqueProxy:
    """Replaces the Trainer or the batch index in a step; it can be passed on, but reading it is an error."""

    is_seen = False

    def _look(self, *args: Any, **kwargs: Any) -> NoReturn:
        object.__setattr__(self, "is_seen", True)
        raise NotVectorizable("training_step looks at the Trainer or at batch_idx")

    __getattr__ = __bool__ = __hash__ = __str__ = __repr__ = __format__ = __index__ = __int__ = __float__ = _look
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _look
    __add__ = __sub__ = __mul__ = __truediv__ = __floordiv__ = __mod__ = __pow__ = _look
    __radd__ = __rsub__ = __rmul__ = __rtruediv__ = __rfloordiv__ = __rmod__ = __rpow__ = _look


class TrainerView:
    """Replaces the Trainer in a step: only attributes that are the same for all clients can be read.

    Args:
        trainer: The Trainer.
        names: The readable attributes.
    """

    def __init__(self, trainer: L.Trainer, names: Collection[str]) -> None:
        vars(self).update(_trainer=trainer, _names=names, seen=None)

    def __getattr__(self, name: str) -> Any:
        if name not in vars(self)["_names"]:
            self._refuse(f"uses trainer.{name}")
        return getattr(vars(self)["_trainer"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._refuse(f"sets trainer.{name}")

    def _refuse(self, what: str) -> NoReturn:
        # Noted too, because a training_step may catch the error.
        vars(self)["seen"] = f"training_step {what}, which may not be the same for all clients"
        raise NotVectorizable(vars(self)["seen"])


class StepWatch:
    """Watches for side effects of steps of several clients.

    Args:
        trainer: The Trainer.
        engine: Trains the groups.
        capture: Records what the clients log.
    """

    def __init__(self, trainer: L.Trainer, engine: VectorizedEngine, capture: LogCapture) -> None:
        self.trainer = trainer
        self.engine = engine
        self.module = capture.module
        self.metrics = capture.metrics
        self.version = 0
        """Number of times that the state was changed by code other than steps."""
        self._snapshot: Snapshot | None = None
        self._trial = Snapshot()
        self._managed: set[int] = set()
        self._frozen: list[tuple[str, torch.Tensor, int]] = []
        self._drawn: tuple[Any, ...] = ()

    def begin(self) -> None:
        """Notes the state before a group's data is read."""
        managed = self.engine.tensors.all
        ids = set(map(id, managed.values()))
        # Hooks between two groups or rounds may legitimately have changed it.
        if self._snapshot is None or ids != self._managed or any(self._snapshot.differences()):
            self._managed, self._snapshot = ids, self._capture(managed.values())
            self.version += 1
        # Not copied: a frozen backbone would take its memory twice.
        frozen = self.engine.tensors.frozen
        self._frozen = [(name, own, version_counter(own)) for name, own in frozen.items() if not own.is_inference()]

    def _capture(self, managed: Any, known: Any = None) -> Snapshot:
        lambdas = [getattr(own.scheduler, "lr_lambdas", ()) for own in self.trainer.lr_scheduler_configs]
        return capture(
            (self.module, *lambdas),
            managed,
            known=self.metrics if known is None else known,
            outside=(L.Trainer, type(self.trainer)),
            ignored=_ignored,
            name="self",
        )

    def begin_trial(self) -> None:
        """Notes the state before a trial step, which must leave no trace."""
        # Everything, also frozen parameters and torchmetrics, which no step of several clients may touch itself.
        tensors = self.engine.tensors
        trained = {**tensors.trainable, **tensors.personal, **tensors.buffers}
        self._trial = self._capture(trained.values(), known=())

    def end_trial(self) -> str | None:
        """Restores everything; returns what the step has changed."""
        changed = next(self._trial.differences(), None)
        self._trial.restore()
        return changed

    def obstacle(self) -> str | None:
        """Describes state of the module that can't be watched; None if there is none."""
        assert self._snapshot is not None
        for path, kind in self._snapshot.opaque.items():
            return f"{path} holds a {kind}, of which each client would need its own"
        for path in self._snapshot.aliases:
            return f"{path} holds one of the module's tensors, of which each client has its own"
        for name in sorted(self._snapshot.names & TAKES_DRAWS_BACK):
            return f"{name}() may take random numbers back after they were drawn"
        if "open" in self._snapshot.names:
            return "open() may write to a file for each client"
        if has_global_hooks():
            return "forward hooks of all modules would see several clients at once"
        return None

    def start(self) -> None:
        """Notes the random generators when the clients have been loaded."""
        self._drawn = random_states()

    def check(self, draws: bool = False) -> None:
        """Checks that the steps since :meth:`start` have changed nothing besides the clients' tensors.

        Args:
            draws: Whether the steps may draw torch's random numbers.

        Raises:
            NotVectorizable: If they have changed anything else.
        """
        assert self._snapshot is not None
        changed = next(self._snapshot.differences(), None)
        if changed is not None:
            raise NotVectorizable(f"training_step changes {changed}, which would hold values of several clients")
        if self._written is not None:
            raise NotVectorizable(f"training_step writes to {self._written}, which all clients share")
        now = random_states()
        if now[draws:] != self._drawn[draws:]:
            raise NotVectorizable("training_step draws random numbers, one for all clients")

    @property
    def _written(self) -> str | None:
        return next((name for name, own, version in self._frozen if version_counter(own) != version), None)

    def restore(self) -> None:
        """Restores the module's state from before the group.

        Raises:
            ValueError: If a frozen parameter was written to, since no copy of it is kept.
        """
        assert self._snapshot is not None
        if self._written is not None:
            raise ValueError(
                f"training_step writes to the frozen parameter {self._written!r}, though it did not at first. Let each "
                "client train alone with FederatedStrategy(engine='sequential')."
            )
        self._snapshot.restore()

    def close(self) -> None:
        """Frees all noted state."""
        self._snapshot, self._trial, self._frozen = None, Snapshot(), []

    @contextmanager
    def view(self, equal_steps: bool) -> Iterator[None]:
        """A block in which the module sees only those attributes of the Trainer that are the same for all clients."""
        view = TrainerView(self.trainer, SAME_FOR_ALL_CLIENTS | (SAME_IN_EQUAL_STEPS if equal_steps else set()))
        with trainer_replaced(self.module, view):
            yield
        if vars(view)["seen"] is not None:
            raise NotVectorizable(vars(view)["seen"])


def _ignored(owner: Any) -> Collection[str]:
    if isinstance(owner, L.LightningModule):
        return _OF_LIGHTNING
    if isinstance(owner, nn.RNNBase):
        return RECURRENT_COPIES  # which the engine puts back
    return _NOT_IN_STEPS if isinstance(owner, type) and issubclass(owner, nn.Module) else ()


def random_states() -> tuple[Any, ...]:
    """States that reveal a draw from the global generators of torch, NumPy and Python."""
    # A draw from NumPy or Python moves the generator's position or replaces all its 624 words: one of them is enough.
    _, words, *numpy = np.random.get_state()
    _, python, spare = random.getstate()
    return torch.get_rng_state().numpy().tobytes(), int(words[0]), *numpy, python[0], python[-1], spare
