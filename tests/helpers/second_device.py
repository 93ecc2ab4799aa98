"""A second device on machines without one: tensors that say they are on ``lazy:0`` and are computed on the CPU.

An operation that mixes them with tensors on the CPU raises what CUDA would raise, and so does ``Tensor.numpy``. Tensors
without dimensions may be mixed, as there. Of the devices that torch knows, ``lazy`` is one that needs no library.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("lazy:0")
aten = torch.ops.aten
COPIES = (aten._to_copy.default, aten.copy_.default)


class OnDevice(torch.Tensor):
    """A tensor on the second device; ``values`` holds it on the CPU."""

    values: torch.Tensor

    @staticmethod
    def __new__(cls, values: torch.Tensor) -> OnDevice:
        self: OnDevice = torch.Tensor._make_wrapper_subclass(
            cls,
            values.size(),
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=DEVICE,
            requires_grad=False,
        )
        self.values = values
        return self

    def tolist(self) -> Any:
        return self.values.tolist()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnDevice({self.values})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    leaves, _ = tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    on_device = [tensor for tensor in tensors if isinstance(tensor, OnDevice)]
    others = [tensor for tensor in tensors if not isinstance(tensor, OnDevice) and tensor.dim() > 0]
    if on_device and others and func not in COPIES:
        raise RuntimeError(f"Expected all tensors to be on the same device, but found cpu and {DEVICE} in {func}")
    asked = kwargs.get("device")
    target = asked if asked is not None else (on_device[0].device if on_device else torch.device("cpu"))
    if func is aten.copy_.default:
        target = args[0].device
    unwrapped_args, unwrapped_kwargs = tree_map(
        lambda leaf: leaf.values if isinstance(leaf, OnDevice) else leaf, (args, kwargs)
    )
    if asked is not None:
        unwrapped_kwargs = {**unwrapped_kwargs, "device": torch.device("cpu")}
    unwrapped_kwargs.pop("pin_memory", None)
    result = func(*unwrapped_args, **unwrapped_kwargs)
    # An operation in place returns the tensor that it was given.
    by_values = {id(tensor.values): tensor for tensor in on_device}

    def wrap(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or isinstance(leaf, OnDevice):
            return leaf
        if id(leaf) in by_values:
            return by_values[id(leaf)]
        return OnDevice(leaf) if torch.device(target).type == DEVICE.type else leaf

    return tree_map(wrap, result)


class SecondDevice(TorchDispatchMode):
    """Inside the block ``device="lazy:0"`` can be used."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})
