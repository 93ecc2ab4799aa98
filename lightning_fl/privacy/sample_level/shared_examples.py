"""Finds examples that several clients hold, or one client several times, each of which costs privacy again."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from torch.utils.data import ConcatDataset, StackDataset, Subset, TensorDataset

from lightning_fl.types import ClientId


class SharedExamples:
    """Counts how often the same example is in the data of the clients that this process knows.

    Two examples are the same if they share a place in memory: the same row of a tensor, the same index of the same data
    set, or the same object in a list. Subsets, concatenated and stacked data sets are unwrapped. An example that a
    client holds several times counts as often. Copies are not found. No information leaves the process.
    """

    def __init__(self) -> None:
        self._memories: dict[int, _Memory] = {}
        self._num_in_use = 100
        self._lists = _Lists()
        self.largest = 1
        """The largest number of copies of an example so far."""

    def add(self, client: ClientId, dataset: Any) -> None:
        """Adds the data of a client, unless it is known already."""
        found: dict[int, list[_Part]] = {}
        for part in _parts(dataset, np.arange(len(dataset), dtype=np.int64)):
            found.setdefault(part.base, []).append(part)
        # All examples in one memory at once, because a client is counted only once per memory.
        for base, parts in found.items():
            add = self._lists.add(client, parts) if base == _LISTS else self._add(client, base, parts)
            self.largest = max(self.largest, add)

    def _add(self, client: ClientId, base: int, parts: Sequence[_Part]) -> int:
        """Adds a client's examples in one memory; returns the largest count of one."""
        memory = self._memories.get(base)
        # Freed memory may be reused for other examples.
        if memory is None or not memory.sources:
            memory = self._memories[base] = _Memory()
            if len(self._memories) > 2 * self._num_in_use:
                self._memories = {place: own for place, own in self._memories.items() if own.sources or own is memory}
                self._num_in_use = len(self._memories)
        memory.sources.update((id(part.source), part.source) for part in parts)
        if client in memory.clients:
            return 0
        memory.clients.add(client)
        return memory.places.add(np.concatenate([part.rows for part in parts]))


@dataclass
class _Memory:
    """A region of memory that holds examples, while one of its objects is in use."""

    sources: weakref.WeakValueDictionary[int, Any] = field(default_factory=weakref.WeakValueDictionary)
    clients: set[ClientId] = field(default_factory=set)
    places: _Counts = field(default_factory=lambda: _Counts())


class _Counts:
    """Counts numbers, in sorted arrays that are each at most half as long as the one before."""

    def __init__(self) -> None:
        self._arrays: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, numbers: np.ndarray) -> int:
        """Adds numbers, in time that hardly depends on how many there are; returns the largest count of a number."""
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


class _Lists:
    """Counts how often an object is in the lists of clients.

    There is no notification when a list is freed and its objects' addresses are reused. So the list is kept until it
    has no other references.
    """

    def __init__(self) -> None:
        self._lists: dict[int, Sequence[Any]] = {}
        self._numbers: dict[int, int] = {}
        self._next = count()
        self._clients: dict[ClientId, tuple[set[int], np.ndarray]] = {}
        self._places = _Counts()

    def add(self, client: ClientId, parts: Sequence[_Part]) -> int:
        """Adds the examples that a client has in lists; returns the largest count of one."""
        self._forget()
        if client in self._clients:
            return 0
        for part in parts:
            if id(part.source) not in self._lists:
                self._lists[id(part.source)], self._numbers[id(part.source)] = part.source, next(self._next)
        places = [self._place(part.source, row) for part in parts for row in part.rows.tolist()]
        self._clients[client] = {id(part.source) for part in parts}, np.array(places, dtype=np.int64)
        return self._places.add(self._clients[client][1])

    def _forget(self) -> None:
        """Drops lists that have no other references."""
        free = {key for key in self._lists if sys.getrefcount(self._lists[key]) <= _REFERENCES}
        gone = [client for client, (keys, _) in self._clients.items() if keys <= free] if free else []
        if not gone:
            return
        for client in gone:
            del self._clients[client]
        kept = set().union(*(keys for keys, _ in self._clients.values()))
        self._lists = {key: own for key, own in self._lists.items() if key in kept}
        self._numbers = {key: self._numbers[key] for key in kept}
        self._places = _Counts()
        for _, places in self._clients.values():
            self._places.add(places)

    def _place(self, source: Sequence[Any], row: int) -> int:
        example = source[row]
        first = example[0] if isinstance(example, tuple | list) and example else example
        if isinstance(first, Tensor) and first.numel():
            return first.data_ptr()
        if not isinstance(example, _VALUES):
            return id(example)
        # Python shares one object for all equal small integers and many strings.
        return -(self._numbers[id(source)] << 32) - row - 1


class _Part(NamedTuple):
    """Examples in one memory: the object that holds them, a number for each example's place, and one for the memory."""

    source: Any
    rows: np.ndarray
    base: int


_LISTS = -1
"""The number of the memory of all lists."""
_VALUES = (int, float, complex, str, bytes, type(None))
_ALONE = [object()]
_REFERENCES = sys.getrefcount(_ALONE[0])
"""Number of references to an object that only a container holds."""


def _parts(dataset: Any, rows: np.ndarray) -> Iterator[_Part]:
    """The places in memory of some examples of a data set."""
    rows = np.where(rows < 0, rows + len(dataset), rows)
    if isinstance(dataset, Subset):
        yield from _parts(dataset.dataset, np.asarray(dataset.indices, dtype=np.int64)[rows])
    elif hasattr(dataset, "examples_of"):
        yield from _parts(dataset.examples_of, rows)
    elif isinstance(dataset, ConcatDataset):
        ends = np.asarray(dataset.cumulative_sizes)
        places = np.searchsorted(ends, rows, side="right")
        for place in np.unique(places):
            own = dataset.datasets[place]
            yield from _parts(own, rows[places == place] - ends[place] + len(own))
    elif isinstance(dataset, StackDataset):
        columns = dataset.datasets
        yield from _parts(columns[0] if isinstance(columns, tuple) else next(iter(columns.values())), rows)
    elif isinstance(dataset, TensorDataset) and _row_bytes(dataset.tensors[0]):
        first = dataset.tensors[0]
        yield _Part(first, first.data_ptr() + rows * _row_bytes(first), first.untyped_storage().data_ptr())
    elif isinstance(dataset, list | tuple):
        yield _Part(dataset, rows, _LISTS)
    elif type(dataset).__weakrefoffset__:  # without it, reuse of its address could not be detected
        yield _Part(dataset, rows, id(dataset))


def _row_bytes(tensor: Tensor) -> int:
    return tensor.stride(0) * tensor.element_size() if tensor.dim() and tensor.numel() else 0
