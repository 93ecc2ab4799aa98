"""What a module keeps beside its parameters: buffers and attributes, which steps outside training must not change."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_fl.torch_internals import own_buffers

_OWN = frozenset(vars(nn.Module())) - {"training"}


class ModuleState:
    """Parameters, buffers and attributes of a module and its submodules, as they are now.

    Attributes are kept by value if they are tensors, arrays, numbers, texts, or lists, dicts and sets of them; of other
    objects only the reference is kept.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._attributes = {name: (part, _attributes_of(part)) for name, part in module.named_modules()}
        self._buffers = {
            (name, key): (part, value, None if value is None else value.detach().clone())
            for name, part in module.named_modules()
            for key, value in own_buffers(part).items()
        }
        self._params = [(param, param.detach().clone()) for param in module.parameters()]

    @torch.no_grad()
    def restore(self) -> None:
        """Puts everything back."""
        for param, start in self._params:
            param.copy_(start)
        for (_, key), (part, tensor, value) in self._buffers.items():
            # The tensor itself beside its value, because others may refer to it.
            setattr(part, key, None if tensor is None or value is None else tensor.copy_(value))
        for part, attributes in self._attributes.values():
            now = vars(part)
            for key in [key for key in now if key not in attributes and key not in _OWN]:
                del now[key]
            now.update({key: _copy(value) for key, value in attributes.items()})

    def changed(self, tensors_only: bool = False) -> list[str]:
        """The names of the buffers and attributes that have another value now.

        Args:
            tensors_only: Whether numbers, texts and the like are left out.
        """
        return sorted(self._changed(tensors_only))

    def _changed(self, tensors_only: bool) -> Iterator[str]:
        for (name, key), (part, _, value) in self._buffers.items():
            if not _same(own_buffers(part).get(key), value):
                yield f"{name}.{key}".lstrip(".")
        for name, (part, attributes) in self._attributes.items():
            for key, value in _attributes_of(part, copies=False).items():
                before = attributes.get(key, _MISSING)
                if not _same(before, value) and (not tensors_only or _holds_tensors(value) or _holds_tensors(before)):
                    yield f"{name}.{key}".lstrip(".")


_MISSING = object()


def _attributes_of(part: nn.Module, copies: bool = True) -> dict[str, Any]:
    return {key: _copy(value) if copies else value for key, value in vars(part).items() if key not in _OWN}


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        # A tensor of a graph can't be copied without losing it, and nobody writes to it in place.
        return value if isinstance(value, nn.Parameter) or value.grad_fn is not None else value.detach().clone()
    if isinstance(value, np.ndarray):
        return value.copy()
    if type(value) is dict:
        return {key: _copy(item) for key, item in value.items()}
    if type(value) in (list, set):
        return type(value)(map(_copy, value))
    return value


def _same(before: Any, now: Any) -> bool:
    if before is now:
        return True
    if isinstance(before, Tensor) and isinstance(now, Tensor):
        return before.shape == now.shape and before.dtype == now.dtype and bool(((before == now) | _nan(now)).all())
    if isinstance(before, np.ndarray) and isinstance(now, np.ndarray):
        return np.array_equal(before, now)
    if type(before) is type(now) and isinstance(now, dict):
        return before.keys() == now.keys() and all(_same(before[key], now[key]) for key in now)
    if type(before) is type(now) and isinstance(now, list | tuple):
        return len(before) == len(now) and all(map(_same, before, now))
    if isinstance(now, int | float | str | bool | set | type(None)) or isinstance(before, int | float | str | bool):
        return bool(before == now) if type(before) is type(now) else False
    return type(before) is type(now)


def _nan(value: Tensor) -> Tensor:
    return value != value  # also for integers, which have no isnan


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, Tensor | np.ndarray):
        return True
    if isinstance(value, dict):
        return any(map(_holds_tensors, value.values()))
    return isinstance(value, list | tuple | set) and any(map(_holds_tensors, value))
