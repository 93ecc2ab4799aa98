"""Tensors sharded over the processes of a silo (torch's ``DTensor``): their local parts, and the full tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from lightning_fl.types import Tree


def is_spread(tensor: Tensor) -> bool:
    """Whether each process holds only a part of the tensor."""
    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds, in the same memory; the whole tensor if it is not sharded."""
    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local().detach()


def locals_of(tensors: Mapping[str, Tensor]) -> Tree:
    """:func:`local` of each tensor."""
    return {name: local(tensor) for name, tensor in tensors.items()}


def spread_like(part: Tensor, like: Tensor) -> Tensor:
    """A tensor that is sharded like ``like``, with ``part`` as this process's part."""
    if not isinstance(like, DTensor):
        return part
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def whole(part: Tensor, like: Tensor) -> Tensor:
    """The full tensor of parts sharded like ``like``; a collective of the processes that hold them."""
    spread = spread_like(part, like)
    return spread.full_tensor() if isinstance(spread, DTensor) else part


def part_of(value: Tensor, like: Tensor) -> Tensor:
    """This process's part of a full tensor; the inverse of :func:`whole`, without communication."""
    if not isinstance(like, DTensor):
        return value
    mesh = like.device_mesh
    held = DTensor.from_local(value.to(local(like).device), mesh, [Replicate()] * mesh.ndim, run_check=False)
    return held.redistribute(placements=like.placements).to_local().clone()


def gather_state(state: Any, like: Mapping[str, Tensor]) -> Any:
    """A state with full tensors in place of the parts of those parameters that are sharded.

    Args:
        state: Trees, nested to any depth.
        like: The parameters, by their names.
    """
    return _map(state, like, whole, lambda own: local(own).shape)


def scatter_state(state: Any, like: Mapping[str, Tensor]) -> Any:
    """The inverse of :func:`gather_state`."""
    return _map(state, like, part_of, lambda own: own.shape)


def _map(state: Any, like: Mapping[str, Tensor], change: Any, shape_of: Any) -> Any:
    found = {}
    for name, value in state.items():
        if isinstance(value, Mapping):
            found[name] = _map(value, like, change, shape_of)
        elif name in like and is_spread(like[name]) and value.shape == shape_of(like[name]):
            found[name] = change(value, like[name])
        else:
            found[name] = value
    return found
