"""Fast collation: one indexing operation per batch of an in-memory ``TensorDataset``, not one per example."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Subset, TensorDataset, default_collate


class _CollatedBatch(list):
    """Marks a batch that :func:`collate_indexed` must not collate again."""


class IndexedTensors(TensorDataset):
    """A ``TensorDataset`` that returns whole batches, equal to those of ``default_collate``.

    It is also a :class:`~lightning_fl.data.lazy_batches.RowSource`.
    """

    def __getitems__(self, indices: list[int]) -> list[Tensor]:
        """The collated batch of the examples at ``indices``."""
        return _CollatedBatch(self.gather(indices))

    def gather(self, indices: Any) -> list[Tensor]:
        """The collated batch of the examples at ``indices``, integers of shape ``[batch]``."""
        rows = torch.as_tensor(indices, dtype=torch.int64)
        rows = torch.where(rows < 0, rows + len(self), rows)  # index_select is twice as fast, but refuses negative ones
        return [tensor.index_select(0, rows.to(tensor.device)) for tensor in self.tensors]

    def to(self, device: torch.device) -> IndexedTensors:
        """The same rows on another device."""
        return IndexedTensors(*(tensor.to(device) for tensor in self.tensors))

    @property
    def row_spec(self) -> Any:
        """Shape and dtype of one row of each tensor."""
        return tuple((tensor.shape[1:], tensor.dtype) for tensor in self.tensors)

    @property
    def source_id(self) -> Any:
        """Equal for data sets that share their tensors, such as the subsets of different clients."""
        return tuple(map(id, self.tensors))


class IndexedSubset(Subset):
    """A subset of :class:`IndexedTensors` that returns whole batches too."""

    dataset: IndexedTensors

    def __getitems__(self, indices: list[int]) -> list[Tensor]:
        """The collated batch of the examples at ``indices``."""
        return _CollatedBatch(self.dataset.gather([self.indices[index] for index in indices]))


def with_fast_collation(dataset: Any, collate_fn: Callable[..., Any] | None) -> tuple[Any, Callable[..., Any] | None]:
    """The data set and ``collate_fn`` for a ``DataLoader``, replaced by faster equivalents where there are any.

    Args:
        dataset: A map-style data set.
        collate_fn: The loader's ``collate_fn``. None: ``default_collate``.
    """
    if collate_fn not in (None, default_collate):
        return dataset, collate_fn
    # Exact types only: a subclass may override __getitem__, which indexing the tensors would bypass.
    if type(dataset) is TensorDataset:
        return IndexedTensors(*dataset.tensors), collate_indexed
    if type(dataset) is Subset and type(dataset.dataset) is TensorDataset:
        return IndexedSubset(IndexedTensors(*dataset.dataset.tensors), dataset.indices), collate_indexed
    return dataset, collate_fn


def collate_indexed(batch: Any) -> Any:
    """``default_collate`` that leaves batches of :class:`IndexedTensors` unchanged."""
    # A plain list, as `default_collate` returns: code that checks the exact type must not see the marker class.
    return list(batch) if isinstance(batch, _CollatedBatch) else default_collate(batch)
