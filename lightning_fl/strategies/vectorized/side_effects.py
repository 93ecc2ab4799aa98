"""Detects side effects of a training step: changed attributes of the module, and random numbers drawn."""

from __future__ import annotations

import copy
import random
from collections import deque
from collections.abc import Sized
from types import FunctionType, ModuleType
from typing import Any

import lightning as L
import numpy as np
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from lightning_fl.strategies.vectorized.log_capture import NotVectorizable
from lightning_fl.torch_internals import FORWARD_HOOKS, version_counter

Attributes = dict[str, tuple[Any, Any, Any]]
_SIMPLE = (int, float, bool, str, type(None))
_CLOSED = (nn.Module, type, FunctionType, ModuleType)
_READ_BY_STEPS = {"training", *FORWARD_HOOKS}
FRAMEWORK_ATTRIBUTES = vars(L.LightningModule()).keys() - _READ_BY_STEPS


def attributes(module: nn.Module, path: str = "") -> Attributes:
    """The :func:`own_attributes` of a module and its submodules, without torchmetrics."""
    found = {f"{path}{name}": entry for name, entry in own_attributes(module).items()}
    for name, child in module.named_children():
        if not isinstance(child, Metric | MetricCollection):
            found.update(attributes(child, f"{path}{name}."))
    return found


def own_attributes(module: nn.Module) -> Attributes:
    """By attribute, its value, a shallow copy of it if it is a container, and marks that differ if it changes."""
    return {
        # The value is kept alive: the id of an object that is freed could be given to its successor and hide the
        # change.
        name: (value, _shallow_copy(value), _marks(value))
        for name, value in vars(module).items()
        if name not in FRAMEWORK_ATTRIBUTES
    }


def check_unchanged(before: Attributes, after: Attributes) -> None:
    """Makes sure that a step has not set attributes of the module.

    Raises:
        NotVectorizable: If it has.
    """
    changed = [key for key in {**before, **after} if before.get(key, (0,))[-1] != after.get(key, (0,))[-1]]
    if changed:
        raise NotVectorizable(f"training_step changes self.{changed[0]}, which would hold values of several clients")


def put_back(module: nn.Module, before: Attributes) -> None:
    """Restores the attributes of a module and its submodules."""
    for key in set(attributes(module)) - set(before):
        path, _, name = key.rpartition(".")
        # Past `nn.Module`, whose own methods would look the name up among parameters, buffers and submodules.
        object.__delattr__(module.get_submodule(path), name)
    for key, (value, items, _) in before.items():
        path, _, name = key.rpartition(".")
        object.__setattr__(module.get_submodule(path), name, value)
        if isinstance(value, list):
            value[:] = items
        elif isinstance(value, dict | set):
            value.clear()
            value.update(items)
        elif items is not None:
            own: dict[str, Any] = value.__dict__
            for added in own.keys() - items.keys():
                del own[added]
            own.update(items)


def random_states() -> tuple[Any, ...]:
    """What shows a draw from the global generators of NumPy and Python; ``torch.func.vmap`` watches torch's.

    A draw either moves a generator's position or replaces all its 624 words, so that one of these is enough.
    """
    _, words, *numpy = np.random.get_state()
    _, python, spare = random.getstate()
    return int(words[0]), *numpy, python[0], python[-1], spare


def check_undrawn(before: tuple[Any, ...]) -> None:
    """Makes sure that a step has drawn no random numbers from NumPy or Python.

    Raises:
        NotVectorizable: If it has.
    """
    if random_states() != before:
        raise NotVectorizable("training_step draws random numbers from Python or NumPy, one for all clients")


def _shallow_copy(value: Any) -> Any:
    """A copy of a container, or of an object's attributes; None for values whose content is not compared."""
    if isinstance(value, (list, dict, set)):
        return copy.copy(value)
    is_looked_into = hasattr(value, "__dict__") and not isinstance(value, (Tensor, *_CLOSED))
    return dict(vars(value)) if is_looked_into else None


def _marks(value: Any, depth: int = 3) -> Any:
    """Marks that differ if something in the value changes: identities, and version counters of tensors."""
    if type(value) in _SIMPLE:
        return type(value), value
    if isinstance(value, Tensor):
        # An in-place write keeps the identity but counts the version up, without a look at the content.
        return id(value), version_counter(value)
    if isinstance(value, np.ndarray):
        return id(value), value.tobytes()
    if depth == 0 or isinstance(value, _CLOSED):
        return id(value)
    # The marks are taken in every step, so long containers are compared by length only.
    if isinstance(value, Sized) and len(value) > 1000:
        return id(value), len(value)
    if isinstance(value, dict):
        return id(value), [(key, _marks(item, depth - 1)) for key, item in value.items()]
    if isinstance(value, (list, tuple, set, deque)):
        return id(value), [_marks(item, depth - 1) for item in value]
    own = getattr(value, "__dict__", None)
    return id(value), None if own is None else _marks(own, depth - 1)
