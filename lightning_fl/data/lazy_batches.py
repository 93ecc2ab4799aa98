"""Batches that are not read until they are used: rows of tensors in memory, several clients' at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Subset, TensorDataset, default_collate

from lightning_fl.data.collation import IndexedSubset, IndexedTensors, collate_indexed, take_rows


class _Tensors:
    """The rows of a ``TensorDataset``."""

    def __init__(self, dataset: TensorDataset) -> None:
        self.tensors = dataset.tensors
        self.key = tuple(map(id, self.tensors))
        self.row = tuple((tensor.shape[1:], tensor.dtype) for tensor in self.tensors)

    def gather(self, indices: np.ndarray) -> list[Tensor]:
        """The collated batch of these rows."""
        return take_rows(self.tensors, indices)


class LazyBatch:
    """A batch that has not been read yet.

    Args:
        source: Has ``gather(indices)``; ``row``, the shape and dtype of each tensor's row; and ``key``, which is the
            same for sources of the same rows.
        indices: The rows, int64 of shape ``[num_rows]``.
    """

    def __init__(self, source: Any, indices: np.ndarray) -> None:
        self.source = source
        self.indices = indices

    @property
    def signature(self) -> Any:
        """What must be alike for batches to be stacked."""
        return len(self.indices), self.source.row

    @property
    def num_bytes(self) -> int:
        """Bytes of the batch once it is read."""
        return len(self.indices) * sum(shape.numel() * dtype.itemsize for shape, dtype in self.source.row)


def stack_lazy(batches: Sequence[LazyBatch]) -> list[Tensor]:
    """Reads the batches of several clients, stacked; at once if they are rows of the same source."""
    source = batches[0].source
    if any(batch.source.key != source.key for batch in batches):
        read = [batch.source.gather(batch.indices) for batch in batches]
        return [torch.stack(own) for own in zip(*read, strict=True)]
    indices = np.concatenate([batch.indices for batch in batches])
    return [tensor.unflatten(0, (len(batches), -1)) for tensor in source.gather(indices)]


class LazyLoader:
    """Yields the batches of a ``DataLoader`` as :class:`LazyBatch`, and draws the random numbers that it would."""

    def __init__(self, loader: DataLoader, source: Any, indices: np.ndarray | None) -> None:
        self.loader = loader
        self.sampler = loader.sampler
        self.batch_sampler = loader.batch_sampler
        self._source = source
        self._indices = indices

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[LazyBatch]:
        torch.empty((), dtype=torch.int64).random_(generator=self.loader.generator)  # the seed of workers
        for batch in self.batch_sampler:  # type: ignore[union-attr]
            rows = np.asarray(batch, dtype=np.int64)
            yield LazyBatch(self._source, rows if self._indices is None else self._indices[rows])


def as_lazy(loader: Any) -> Any:
    """The loader's batches as :class:`LazyBatch` if it only reads tensors in memory; else the loader itself."""
    if type(loader) is not DataLoader or type(loader.batch_sampler) is not BatchSampler:
        return loader
    if loader.num_workers or loader.pin_memory or loader.collate_fn not in (default_collate, collate_indexed):
        return loader
    found = _find_source(loader.dataset)
    return loader if found is None else LazyLoader(loader, *found)


def _find_source(dataset: Any) -> tuple[Any, np.ndarray | None] | None:
    if type(dataset) in (TensorDataset, IndexedTensors):
        return _Tensors(dataset), None
    if type(dataset) in (Subset, IndexedSubset):
        found = _find_source(dataset.dataset)
        if found is None:
            return None
        indices = np.asarray(dataset.indices, dtype=np.int64)
        return found[0], indices if found[1] is None else found[1][indices]
    if hasattr(dataset, "gather") and hasattr(dataset, "key") and getattr(dataset, "row", None) is not None:
        return dataset, None
    return None
