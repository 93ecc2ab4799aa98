"""Stacks the values of several clients along a new first dimension, and takes them apart again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_fl.engines.vectorized.buffer_pool import BufferPool
from lightning_fl.torch_internals import pytree

PLAIN = (type(None), bool, int, float, complex, str, bytes)


class NotStackable(ValueError):
    """Raised for values of clients that can't be stacked."""


class NotVectorizable(Exception):
    """Raised when a module's step can't run for several clients at once."""


class StackedBatch:
    """The batches of several clients, stacked; Lightning moves it to a device as one.

    Args:
        content: The batches, in which each tensor is stacked over the clients.
        mask: The positions in the group of the clients that train on it, in order.
        following: The batches of the next steps, if these may be trained together with that on this one.
    """

    def __init__(self, content: Any, mask: Sequence[int], following: Sequence[StackedBatch] = ()) -> None:
        self.content = content
        self.mask = tuple(mask)
        self.following = following

    def to(self, device: torch.device, **kwargs: Any) -> StackedBatch:
        """The batch on ``device``."""
        content = pytree.tree_map_only(Tensor, lambda leaf: leaf.to(device, **kwargs), self.content)
        return StackedBatch(content, self.mask, self.following)


def stack(values: Sequence[Any], share: bool = True, pool: BufferPool | None = None) -> tuple[Any, Any]:
    """Stacks equally shaped values, leaf by leaf.

    Args:
        values: One value per client: tensors, or nested containers of them.
        share: Whether a tensor that is the same object for all clients is left as it is instead of stacked.
        pool: Provides the memory of the stacked tensors. None: PyTorch's allocator.

    Returns:
        The value with a first dimension over the clients in each tensor, and its ``in_dims`` for ``torch.func.vmap``: 0
        for stacked tensors, None for leaves that all clients share.

    Raises:
        NotStackable: If the values differ in structure, shape, dtype, or in a leaf that is not a tensor.
    """
    first = values[0]
    if type(first) in (tuple, list, dict):
        keys = first.keys() if type(first) is dict else range(len(first))
        for value in values:
            if type(value) is not type(first) or (value.keys() if type(value) is dict else range(len(value))) != keys:
                raise NotStackable("they differ in structure")
        pairs = [stack([value[key] for value in values], share, pool) for key in keys]
        stacked, dims = ([pair[side] for pair in pairs] for side in (0, 1))
        if type(first) is dict:
            return dict(zip(keys, stacked, strict=True)), dict(zip(keys, dims, strict=True))
        return type(first)(stacked), type(first)(dims)
    if isinstance(first, Tensor):
        return _stack_leaf(values, share, pool)
    flat = [pytree.tree_flatten(value) for value in values]
    spec = flat[0][1]
    if any(own != spec for _, own in flat[1:]):
        raise NotStackable("they differ in structure")
    pairs = [_stack_leaf(leaves, share, pool) for leaves in zip(*(leaves for leaves, _ in flat), strict=True)]
    stacked, dims = ([pair[side] for pair in pairs] for side in (0, 1))
    return pytree.tree_unflatten(stacked, spec), pytree.tree_unflatten(dims, spec)


def _stack_leaf(leaves: Sequence[Any], share: bool, pool: BufferPool | None) -> tuple[Any, int | None]:
    first = leaves[0]
    # Compared by identity: comparing the elements would read every tensor, and equal ones may be written to separately.
    if share and all(leaf is first for leaf in leaves):
        return first, None
    if not isinstance(first, Tensor):
        # By repr and type, so that NaN equals itself and 1 differs from True.
        if type(first) not in PLAIN or any(
            type(leaf) is not type(first) or repr(leaf) != repr(first) for leaf in leaves
        ):
            raise NotStackable(f"they differ in a {type(first).__name__}, and only tensors can be stacked")
        return first, None
    for leaf in leaves:
        if not isinstance(leaf, Tensor) or leaf.shape != first.shape or leaf.dtype != first.dtype:
            raise NotStackable(f"they differ in shape: {_kind(first)} and {_kind(leaf)}")
    # Autograd can't record an operation that writes to `out`.
    if pool is None or any(leaf.requires_grad for leaf in leaves):
        return torch.stack(list(leaves)), 0
    return torch.stack(list(leaves), out=pool.empty((len(leaves), *first.shape), first)), 0


def _kind(leaf: Any) -> str:
    return f"{tuple(leaf.shape)} of {leaf.dtype}" if isinstance(leaf, Tensor) else type(leaf).__name__


def part(value: Any, index: int) -> Any:
    """The part of a stacked value that belongs to the client at ``index``."""
    return pytree.tree_map(lambda leaf: leaf[index] if isinstance(leaf, Tensor) else leaf, value)


def select(value: Any, indices: Tensor) -> Any:
    """The stacked value, restricted to the clients at ``indices``."""
    return pytree.tree_map(lambda leaf: leaf[indices] if isinstance(leaf, Tensor) else leaf, value)


def signature(value: Any) -> Any:
    """What must be equal for values to be stacked: structure, shapes, dtypes, and leaves that are no tensors."""
    if isinstance(value, Tensor):
        return value.shape, value.dtype
    if type(value) in (tuple, list):
        return type(value), *map(signature, value)
    leaves, spec = pytree.tree_flatten(value)
    return str(spec), *(
        (leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else (type(leaf), repr(leaf)) for leaf in leaves
    )


def are_finite(tree: Mapping[str, Any], num_clients: int) -> Tensor:
    """Whether all elements of each client in a stacked tree are finite; shape ``[num_clients]``."""
    # A sum is one pass without a mask. It is NaN or infinite if an element is, or if it overflows; only then each
    # element is looked at.
    leaves = [leaf for leaf in pytree.tree_leaves(tree) if not bool(torch.isfinite(leaf.sum()))]
    flags = [torch.isfinite(leaf).reshape(num_clients, -1).all(1) for leaf in leaves]
    return torch.stack([torch.ones(num_clients, dtype=torch.bool), *(flag.cpu() for flag in flags)]).all(0)
