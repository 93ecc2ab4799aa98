"""Lazy batches: row indices that are read for several clients with one indexing operation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Subset, TensorDataset, default_collate

from lightning_fl.data.collation import IndexedSubset, IndexedTensors, collate_indexed


class RowSource(Protocol):
    """An in-memory data set whose batches can be read by row index."""

    @property
    def row_spec(self) -> Any:
        """Shape and dtype of one row of each tensor; None if the rows can't be read by index."""

    @property
    def source_id(self) -> Any:
        """Equal for sources that hold the same rows."""

    @property
    def tensors(self) -> Sequence[Tensor]:
        """The tensors that hold the rows."""

    def to(self, device: torch.device) -> RowSource:
        """The same rows on another device."""

    def gather(self, indices: np.ndarray) -> list[Tensor]:
        """The collated batch of these rows, on the rows' device."""


class LazyBatch:
    """A batch that has not been read yet.

    Args:
        source: The data set that holds its rows.
        indices: The rows, int64 of shape ``[num_rows]``.
    """

    def __init__(self, source: RowSource, indices: np.ndarray) -> None:
        self.source = source
        self.indices = indices

    @property
    def signature(self) -> Any:
        """Equal for batches that can be stacked."""
        return len(self.indices), self.source.row_spec

    @property
    def num_bytes(self) -> int:
        """Size of the batch once it is read, in bytes."""
        return len(self.indices) * sum(shape.numel() * dtype.itemsize for shape, dtype in self.source.row_spec)


def stack_lazy(
    batches: Sequence[LazyBatch], place: Callable[[RowSource], RowSource] = lambda source: source
) -> list[Tensor]:
    """Reads the batches of several clients and stacks them, with one indexing operation if they share their source.

    Args:
        batches: One batch of each client.
        place: Maps a source to the copy that is read, such as one on a GPU. Default: the source itself.
    """
    source = batches[0].source
    # Clients with separate data sets: their rows are not in one tensor.
    if any(batch.source.source_id != source.source_id for batch in batches):
        read = [place(batch.source).gather(batch.indices) for batch in batches]
        return [torch.stack(tensors) for tensors in zip(*read, strict=True)]
    indices = np.concatenate([batch.indices for batch in batches])
    return [tensor.unflatten(0, (len(batches), -1)) for tensor in place(source).gather(indices)]


class LazyLoader:
    """Yields the batches of a ``DataLoader`` as :class:`LazyBatch` and consumes the same random numbers.

    Args:
        loader: The loader, without workers.
        source: The data set that holds the rows.
        indices: Row of each example of the loader's data set, int64 of shape ``[num_examples]``. None: the rows of the
            source in order.
    """

    def __init__(self, loader: DataLoader, source: RowSource, indices: np.ndarray | None) -> None:
        self.loader = loader
        self.sampler = loader.sampler
        self.batch_sampler = loader.batch_sampler
        self._source = source
        self._indices = indices

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[LazyBatch]:
        # DataLoader draws a base seed for its workers even if it has none; without this draw the sampler would
        # shuffle differently.
        torch.empty((), dtype=torch.int64).random_(generator=self.loader.generator)
        for batch in self.batch_sampler:  # type: ignore[union-attr]
            rows = np.asarray(batch, dtype=np.int64)
            yield LazyBatch(self._source, rows if self._indices is None else self._indices[rows])


def as_lazy(loader: Any) -> Any:
    """A :class:`LazyLoader` if the loader only reads tensors in memory; otherwise the loader itself."""
    # Exact types here and below: a subclass may read, batch or collate in a way that the indices do not show.
    if type(loader) is not DataLoader or type(loader.batch_sampler) is not BatchSampler:
        return loader
    if loader.num_workers or loader.pin_memory or loader.collate_fn not in (default_collate, collate_indexed):
        return loader
    found = _find_source(loader.dataset)
    return loader if found is None else LazyLoader(loader, *found)


def _find_source(dataset: Any) -> tuple[RowSource, np.ndarray | None] | None:
    """The source of a data set's rows, and the row of each example if it is a subset."""
    if type(dataset) is TensorDataset:
        return IndexedTensors(*dataset.tensors), None
    if type(dataset) in (Subset, IndexedSubset):
        found = _find_source(dataset.dataset)
        if found is None:
            return None
        indices = np.asarray(dataset.indices, dtype=np.int64)
        return found[0], indices if found[1] is None else found[1][indices]
    if getattr(dataset, "row_spec", None) is not None:
        return dataset, None
    return None
