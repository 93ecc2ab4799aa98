"""The examples of a batch, as rows of its tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


def num_rows(batch: Any) -> int:
    """Returns the number of examples in a batch, the first dimension of its tensors.

    Raises:
        ValueError: If it holds no tensor, or tensors whose first dimensions differ.
    """
    sizes = sorted({tensor.shape[0] if tensor.dim() else -1 for tensor in _tensors(batch)})
    if len(sizes) != 1 or sizes[0] < 0:
        found = f"tensors whose first dimensions are {sizes}" if sizes else f"no tensor in a {type(batch).__name__}"
        raise ValueError(
            f"A batch holds {found}; to tell its examples apart, sample-level privacy needs tensors, possibly in lists "
            "and dicts, whose first dimension is the example. Change the collation accordingly."
        )
    return sizes[0]


def take_rows(batch: Any, rows: slice | list[int]) -> Any:
    """Returns some examples of a batch.

    Raises:
        ValueError: If the batch holds anything but tensors in lists, tuples and dicts.
    """
    size = num_rows(batch)

    def take(value: Any) -> Any:
        if isinstance(value, Tensor):
            chosen = rows if isinstance(rows, slice) else torch.tensor(rows, dtype=torch.int64).to(value.device)
            return value[chosen]
        if isinstance(value, Mapping):
            return {key: take(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            is_nested = any(isinstance(item, Tensor | list | tuple | Mapping) for item in value)
            items: Any = [take(item) for item in value]
            # One plain entry for each example, such as a list of names.
            if len(value) == size and not is_nested:
                items = value[rows] if isinstance(rows, slice) else [value[row] for row in rows]
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        if value is None or isinstance(value, int | float | str):
            return value
        raise ValueError(
            f"A batch holds a {type(value).__name__}, which can't be divided into examples; sample-level privacy needs "
            "batches of tensors, possibly in lists, tuples and dicts. Change the collation accordingly."
        )

    return take(batch)


def labels_of(batch: Any) -> Tensor | None:
    """The likely labels of a batch: its last tensor with one number per example, preferably integers."""
    flat = [tensor for tensor in _tensors(batch) if tensor.dim() and tensor[:1].numel() == 1]
    whole = [tensor for tensor in flat if not tensor.is_floating_point()]
    chosen = (whole or flat)[-1:]
    return chosen[0].reshape(-1) if chosen else None


def largest_value(batch: Any) -> float:
    """The largest magnitude of the floating-point numbers in a batch."""
    floats = [tensor for tensor in _tensors(batch) if tensor.is_floating_point() and tensor.numel()]
    return max([float(tensor.abs().max()) for tensor in floats], default=0.0)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
