"""Finds examples that several clients hold, each of which pays for them once."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Subset, TensorDataset

from lightning_fl.types import ClientId


class SharedExamples:
    """Counts how often the same example is in the data of the clients that this process knows.

    Two examples are the same if they are the same place in memory: the same row of a tensor, or the same index of the
    same data set. Copies are not found. Nothing that it knows leaves the process.
    """

    def __init__(self) -> None:
        self._memories: dict[int, _Memory] = {}
        self._num_in_use = 100
        self.largest = 1
        """The most copies of an example so far."""

    def add(self, client: ClientId, dataset: Any) -> None:
        """Adds the data of a client, unless it is known already."""
        source, rows, base = _places(dataset)
        if type(source).__weakrefoffset__ == 0:
            return  # such as a list: nothing would tell when its place in memory is given to another
        memory = self._memories.get(base)
        # What is freed gives its place in memory to others.
        if memory is None or not memory.sources:
            memory = self._memories[base] = _Memory()
            if len(self._memories) > 2 * self._num_in_use:
                self._memories = {place: own for place, own in self._memories.items() if own.sources or own is memory}
                self._num_in_use = len(self._memories)
        memory.sources[id(source)] = source
        if client not in memory.clients:
            memory.clients.add(client)
            self.largest = max(self.largest, memory.places.add(rows))


@dataclass
class _Memory:
    """A stretch of memory that holds examples, as long as one of the objects that lie there is in use."""

    sources: weakref.WeakValueDictionary[int, Any] = field(default_factory=weakref.WeakValueDictionary)
    clients: set[ClientId] = field(default_factory=set)
    places: _Counts = field(default_factory=lambda: _Counts())


class _Counts:
    """How often numbers have been added, in sorted arrays each at most half as long as the one before."""

    def __init__(self) -> None:
        self._arrays: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, numbers: np.ndarray) -> int:
        """Adds numbers, in time that hardly depends on how many there are already; returns the largest count of one."""
        if not len(numbers):
            return 0
        own, times = np.unique(numbers, return_counts=True)
        totals = times.copy()
        for known, counts in self._arrays:
            at = np.minimum(np.searchsorted(known, own), len(known) - 1)
            totals += np.where(known[at] == own, counts[at], 0)
        while self._arrays and len(self._arrays[-1][0]) < 2 * len(own):
            known, counts = self._arrays.pop()
            own, where = np.unique(np.concatenate([known, own]), return_inverse=True)
            times = np.bincount(where, np.concatenate([counts, times])).astype(np.int64)
        self._arrays.append((own, times))
        return int(totals.max())


def _places(dataset: Any) -> tuple[Any, np.ndarray, int]:
    """The object that holds a data set's examples, a number for the place of each, and one for the memory of all."""
    rows = np.arange(len(dataset), dtype=np.int64)
    while True:
        if isinstance(dataset, Subset):
            rows, dataset = np.asarray(dataset.indices, dtype=np.int64)[rows], dataset.dataset
        elif hasattr(dataset, "examples_of"):
            dataset = dataset.examples_of
        else:
            break
    if isinstance(dataset, TensorDataset) and _row_bytes(dataset.tensors[0]):
        first = dataset.tensors[0]
        return first, first.data_ptr() + rows * _row_bytes(first), first.untyped_storage().data_ptr()
    return dataset, rows, id(dataset)


def _row_bytes(tensor: Tensor) -> int:
    return tensor.stride(0) * tensor.element_size() if tensor.dim() and tensor.numel() else 0
