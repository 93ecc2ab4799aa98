"""Batches of tensors read by one indexing rather than example by example."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset, TensorDataset, default_collate


class _Batch(list):
    """A batch that is collated already."""


def take_rows(tensors: Sequence[Tensor], indices: Any) -> list[Tensor]:
    """The rows at ``indices`` of each tensor, collated."""
    own = torch.as_tensor(indices, dtype=torch.int64)
    own = torch.where(own < 0, own + len(tensors[0]), own)  # index_select takes half as long, but counts from 0 only
    return [tensor.index_select(0, own) for tensor in tensors]


class IndexedTensors(TensorDataset):
    """A ``TensorDataset`` that gives a batch as ``default_collate`` would make it."""

    def __getitems__(self, indices: list[int]) -> list[Tensor]:
        """The batch of these examples."""
        return _Batch(take_rows(self.tensors, indices))


class IndexedSubset(Subset):
    """A part of a ``TensorDataset`` that gives a batch as ``default_collate`` would make it."""

    def __getitems__(self, indices: list[int]) -> list[Tensor]:
        """The batch of these examples."""
        own = [self.indices[index] for index in indices]
        return _Batch(take_rows(self.dataset.tensors, own))  # type: ignore[attr-defined]


def with_fast_collation(dataset: Any, collate_fn: Callable[..., Any] | None) -> tuple[Any, Callable[..., Any] | None]:
    """What a ``DataLoader`` is to read and how it collates, to give the same batches sooner if it can.

    Args:
        dataset: A map-style data set.
        collate_fn: The loader's; None: the default one.
    """
    if collate_fn not in (None, default_collate):
        return dataset, collate_fn
    if type(dataset) is TensorDataset:
        return IndexedTensors(*dataset.tensors), collate_indexed
    if type(dataset) is Subset and type(dataset.dataset) is TensorDataset:
        return IndexedSubset(dataset.dataset, dataset.indices), collate_indexed
    return dataset, collate_fn


def collate_indexed(batch: Any) -> Any:
    """``default_collate``, for what is collated already or not."""
    return list(batch) if isinstance(batch, _Batch) else default_collate(batch)
