"""What a training step can read besides its batch, so that a change of it shows before a recorded step is replayed."""

from __future__ import annotations

import datetime
import functools
import logging
import sys
import sysconfig
import threading
import types
import weakref
from collections import deque
from collections.abc import Iterable
from pathlib import Path, PurePath
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import Metric

from lightning_fl.strategies.vectorized.log_capture import NotVectorizable
from lightning_fl.strategies.vectorized.side_effects import FRAMEWORK_ATTRIBUTES
from lightning_fl.torch_internals import non_persistent_buffers, own_modules, own_parameters

MAX_MARKS = 4000
_VALUES = {int, float, bool, str, bytes, complex, type(None), range}
_STEADY = (
    *(types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType, types.MethodWrapperType),
    *(types.GetSetDescriptorType, types.MemberDescriptorType, types.ModuleType, types.CodeType),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Generator, np.generic, np.dtype, np.ufunc),
    *(type(Ellipsis), type(NotImplemented), slice, weakref.ReferenceType, logging.Logger, PurePath),
    *(datetime.date, datetime.timedelta, type(threading.Lock()), type(threading.RLock())),
)
_CACHED = type(functools.lru_cache(len))
_OPAQUE = (L.Trainer, Optimizer, LRScheduler)
_NOT_IN_STEPS = {*dir(L.LightningModule)} - {"forward", "training_step"}
_LIBRARIES = {"torch", "lightning", "pytorch_lightning", "torchmetrics", "torchvision", "numpy", "lightning_fl"}


class Guards:
    """What the Python of ``training_step`` can reach from the module at the moment.

    These are its attributes and those of its submodules, of their classes as far as they are the user's, of the objects
    in them, what their functions have closed over, and the global variables that those name. The values in tensors are
    left out, because a recording reads the tensors themselves.

    Args:
        module: The module.

    Raises:
        NotVectorizable: If it holds something of which a change would not show; says what.
    """

    def __init__(self, module: nn.Module) -> None:
        self._marks: list[Any] = []
        self._held: list[Any] = []
        seen: set[int] = set()
        todo: list[Any] = [module]
        while todo:
            value = todo.pop()
            kind = type(value)
            if kind in _VALUES:
                self._marks.append((kind, value))
                continue
            self._marks.append(id(value))
            if id(value) in seen:
                continue
            if len(self._marks) > MAX_MARKS:
                raise NotVectorizable("so much hangs on the module that its changes are not watched")
            seen.add(id(value))
            self._held.append(value)
            marks, inside = _look_into(value)
            self._marks.append(marks)
            todo.extend(inside)

    def differ(self, before: Guards | None) -> bool:
        """Whether something has changed since ``before``."""
        return before is None or self._marks != before._marks


def _look_into(value: Any) -> tuple[Any, Iterable[Any]]:
    """Marks of the object's own, and what is in it."""
    if isinstance(value, Tensor):
        return (value.shape, value.stride(), value.dtype, value.requires_grad), ()
    if isinstance(value, np.ndarray) and not value.dtype.hasobject and value.nbytes <= 2**20:
        return value.tobytes(), ()
    if isinstance(value, nn.Module):
        return None, _in_module(value)
    if isinstance(value, _OPAQUE):
        raise NotVectorizable(f"it holds a {type(value).__name__}, which changes during the round")
    if isinstance(value, dict):
        return len(value), [*value.keys(), *value.values(), *(() if type(value) is dict else _own(value))]
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        return len(value), [*value, *(() if type(value) in (list, tuple) else _own(value))]
    if isinstance(value, types.FunctionType):
        return None, _in_function(value)
    if isinstance(value, type):
        return None, _in_class(value)
    if isinstance(value, types.MethodType):
        return None, (value.__self__, value.__func__)
    if isinstance(value, functools.partial):
        return None, (value.func, value.args, value.keywords)
    if isinstance(value, (staticmethod, classmethod)):
        return None, (value.__func__,)
    if isinstance(value, property):
        return None, (value.fget,)
    if isinstance(value, _CACHED):
        return None, (value.__wrapped__,)
    if isinstance(value, _STEADY) or type(value) is object:
        return None, ()
    inside = [*_own(value)]
    if not inside and not hasattr(value, "__dict__"):
        raise NotVectorizable(f"it holds a {type(value).__name__}, whose changes are not watched")
    return len(inside), inside


def _own(value: Any) -> Iterable[Any]:
    """An object's attributes, and its class if that is the user's."""
    kind = type(value)
    inside = [*getattr(value, "__dict__", {}).items()]
    for owner in kind.__mro__:
        slots = vars(owner).get("__slots__", ())
        names = (slots,) if isinstance(slots, str) else slots
        inside += [(name, getattr(value, name)) for name in names if name[:2] != "__" and hasattr(value, name)]
    return [*(item for pair in inside for item in pair), *([kind] if _is_users(kind.__module__) else [])]


def _in_module(module: nn.Module) -> Iterable[Any]:
    own = {name: value for name, value in vars(module).items() if name not in FRAMEWORK_ATTRIBUTES}
    if isinstance(module, Metric):  # its states and counts change at each step, which does not read them
        own = {name: own[name] for name in own if name[0] != "_" and name not in module.metric_state}
        own = {name: own[name] for name in own if name not in ("update", "compute", "training")}
    own |= own_modules(module)
    own |= {
        name: param for name, param in own_parameters(module).items() if param is not None and not param.requires_grad
    }
    own |= non_persistent_buffers(module)
    kinds = [kind for kind in type(module).__mro__ if _is_users(kind.__module__)]
    return [*own.keys(), *own.values(), *kinds]


def _in_class(kind: type) -> Iterable[Any]:
    if not _is_users(kind.__module__):
        return
    yield from kind.__bases__
    is_lightning = issubclass(kind, L.LightningModule)
    for name, value in vars(kind).items():
        if isinstance(value, types.FunctionType):
            if not (is_lightning and name in _NOT_IN_STEPS):
                yield value
        elif name[:2] != "__" and name != "_abc_impl":
            yield name
            yield value


def _in_function(function: types.FunctionType) -> Iterable[Any]:
    yield function.__defaults__
    yield function.__kwdefaults__
    yield from function.__dict__.values()
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # it is empty
            yield None
    variables = function.__globals__
    if not _is_users(variables.get("__name__", "")):
        return
    names = _names(function.__code__)
    for name in names:
        if name in variables:
            value = variables[name]
            if not isinstance(value, types.ModuleType):
                yield value
            elif _is_users(value.__name__):
                yield from (vars(value)[inner] for inner in names if inner in vars(value))


@functools.lru_cache(maxsize=4096)
def _names(code: types.CodeType) -> tuple[str, ...]:
    nested = [_names(const) for const in code.co_consts if isinstance(const, types.CodeType)]
    return tuple(dict.fromkeys([*code.co_names, *(name for names in nested for name in names)]))


@functools.lru_cache(maxsize=4096)
def _is_users(module: str) -> bool:
    """Whether a Python module is the user's own, rather than a library's."""
    if module.partition(".")[0] in {*_LIBRARIES, *sys.stdlib_module_names}:
        return False
    file = getattr(sys.modules.get(module), "__file__", None)
    path = Path(file or "")
    is_installed = {"site-packages", "dist-packages"} & {*path.parts}
    return not is_installed and not path.is_relative_to(sysconfig.get_path("stdlib"))
