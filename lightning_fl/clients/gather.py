"""Batches of tensors read by one indexing rather than example by example."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset, default_collate


class GatheredTensors(Dataset):
    """A ``TensorDataset``, or a part of one, that gives a batch as ``default_collate`` would make it.

    Args:
        tensors: The columns, each of shape ``[num_samples, ...]``.
        indices: Of the examples that belong to it. None: all.
    """

    def __init__(self, tensors: Sequence[Tensor], indices: Tensor | None = None) -> None:
        self.tensors = tuple(tensors)
        self.indices = indices

    def __len__(self) -> int:
        return len(self.tensors[0]) if self.indices is None else len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        own = index if self.indices is None else int(self.indices[index])
        return tuple(tensor[own] for tensor in self.tensors)

    def __getitems__(self, indices: list[int]) -> list[Tensor]:
        """The batch of these examples."""
        own = torch.tensor(indices, dtype=torch.int64)
        own = own if self.indices is None else self.indices[own]
        return [tensor[own] for tensor in self.tensors]


def gathered(dataset: Any, collate_fn: Callable[..., Any] | None) -> tuple[Any, Callable[..., Any] | None]:
    """What a ``DataLoader`` is to read and how it collates, to give the same batches sooner if it can.

    Args:
        dataset: A map-style data set.
        collate_fn: The loader's; None: the default one.
    """
    inner = dataset.dataset if type(dataset) is Subset else dataset
    if type(inner) is not TensorDataset or collate_fn not in (None, default_collate):
        return dataset, collate_fn
    indices = torch.as_tensor(dataset.indices, dtype=torch.int64) if inner is not dataset else None
    return GatheredTensors(inner.tensors, indices), _as_it_is


def _as_it_is(batch: Any) -> Any:
    return batch
