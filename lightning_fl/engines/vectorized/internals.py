"""Every private function of torch that the vectorized engine calls; tried with torch 2.13."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch as functorch
from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack
from torch._functorch.vmap import lazy_load_decompositions, vmap_increment_nesting
from torch.utils import _pytree as pytree


def flat_vmap(function: Callable[..., Any], tensors: Sequence[Tensor], randomness: str) -> Any:
    """``torch.func.vmap(function, randomness=randomness)(*tensors)`` without its checks of structures."""
    lazy_load_decompositions()
    size = len(tensors[0])
    with vmap_increment_nesting(size, randomness) as level:
        out = function(*(functorch._add_batch_dim(tensor, 0, level) for tensor in tensors))
        return pytree.tree_map_only(Tensor, lambda own: functorch._remove_batch_dim(own, level, size, 0), out)


def unwrap(*tensors: Tensor) -> list[Tensor] | None:
    """The stacked tensors, clients first, that one ``vmap`` shows as those of a client.

    A batching rule in Python needs them: an ``autograd.Function`` with a ``vmap`` method takes ten times as long.

    Returns:
        None if ``vmap`` is not the only transform, or if a tensor is not batched.
    """
    if functorch.maybe_current_level() != 1 or not all(map(functorch.is_batchedtensor, tensors)):
        return None
    pairs = [(functorch.get_unwrapped(tensor), functorch.maybe_get_bdim(tensor)) for tensor in tensors]
    return [tensor.movedim(dim, 0) if dim else tensor for tensor, dim in pairs]


def wrap(stacked: Tensor) -> Tensor:
    """The reverse of :func:`unwrap`."""
    wrapped: Tensor = functorch._add_batch_dim(stacked, 0, 1)
    return wrapped


def outside_vmap() -> AbstractContextManager[None]:
    """Inside the block, operations are those on plain tensors."""
    return temporarily_pop_interpreter_stack()


def num_references(storage: torch.UntypedStorage) -> int:
    """How many tensors and storage objects refer to the memory; autograd's are not visible to Python's counts."""
    count: int = torch._C._storage_Use_Count(storage._cdata)
    return count
