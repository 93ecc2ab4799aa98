"""A lazy mapping from client id to the client's loader."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from numbers import Number
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from lightning_fl.types import ClientId, as_client_id

Loader = Iterable[Any]


class ClientLoaders(Mapping[ClientId, Loader]):
    """Maps each client's id to the loader of its training data, which is created when it is looked up.

    Ids are integers and strings; NumPy's, those of an ``IntEnum`` or ``StrEnum``, and a ``UUID`` become plain ones.

    Args:
        clients: One of three forms: a mapping from id to a loader, or to a function without arguments that creates
            one; a sequence of loaders, whose ids are then ``0 .. n-1``; or, together with ``make_loader``, the ids.
        make_loader: Creates a client's loader from its id as it was given; called at every lookup.
        num_examples: Number of examples that one pass over each client's loader yields: a mapping from id, or a
            function of the id. None: the loader is created to find out, which is slow if many clients are balanced
            over ranks. If the number can't be told from the loader or its batches, as for streams of graphs, it is
            required to weight clients by their examples.

    Raises:
        ValueError: If there are no clients, an id is repeated, or is neither an integer nor a string.

    Example:
        >>> loaders = ClientLoaders(range(3), lambda client: [[client, 1], [client, 2]])
        >>> len(loaders), loaders[2]
        (3, [[2, 1], [2, 2]])
    """

    def __init__(
        self,
        clients: Mapping[ClientId, Loader | Callable[[], Loader]] | Sequence[Any] | Collection[ClientId],
        make_loader: Callable[[Any], Loader] | None = None,
        *,
        num_examples: Callable[[Any], int] | Mapping[Any, int] | None = None,
    ) -> None:
        self._ids: Mapping[ClientId, Any] | range
        ids: Collection[Any]
        if make_loader is not None:
            ids, self._make = clients, make_loader
        elif isinstance(clients, Mapping):
            ids, self._make = clients, lambda client: _call_if_function(clients[client])
        elif isinstance(clients, Sequence):
            ids, self._make = range(len(clients)), lambda client: clients[client]
        else:
            raise ValueError(
                f"ClientLoaders got a {type(clients).__name__}; expected a mapping from client id to loader, a "
                "sequence of loaders, or ids together with `make_loader`."
            )
        # A dict from each id to the one that was given keeps the order, and finds an id in constant time; a range does
        # so without listing a million ids.
        self._ids = ids if isinstance(ids, range) else {as_client_id(name): name for name in ids}
        if len(self._ids) != len(ids):
            raise ValueError(f"Client ids must be unique: found {len(self._ids)} different ids among {len(ids)}.")
        if not self._ids:
            raise ValueError("ClientLoaders got no clients; a federation needs at least one.")
        self._num_examples = num_examples.__getitem__ if isinstance(num_examples, Mapping) else num_examples

    def __getitem__(self, client: ClientId) -> Loader:
        loader = self._make(self._given(client))
        # A list of batches is a loader too; Lightning's CombinedLoader is recognised by its loaders.
        parts = loader if isinstance(loader, list | tuple) else getattr(loader, "flattened", [])
        if isinstance(loader, Mapping) or any(isinstance(part, DataLoader) for part in parts):
            raise ValueError(
                f"The loader of client {client!r} is a {type(loader).__name__} of loaders, but a client has one. Put "
                "its data sets into one DataLoader, with torch.utils.data.ConcatDataset to concatenate them or "
                "StackDataset to combine them example by example."
            )
        return loader

    def _given(self, client: ClientId) -> Any:
        """The id as it was given, which the user's functions expect."""
        # The user's function might create a loader for an id that is not a client's.
        if client not in self:
            raise KeyError(client)
        return client if isinstance(self._ids, range) else self._ids[client]

    def __contains__(self, client: object) -> bool:
        # `Mapping` would look the client up, and so create its loader.
        return client in self._ids

    def __iter__(self) -> Iterator[ClientId]:
        return iter(self._ids)

    @property
    def ids(self) -> Collection[ClientId]:
        """The clients' ids, in the given order."""
        return self._ids if isinstance(self._ids, range) else self._ids.keys()

    def __len__(self) -> int:
        return len(self._ids)

    def num_examples(self, client: ClientId) -> int | None:
        """Examples that one pass over the client's loader yields; None if that is unknown without the loader."""
        return None if self._num_examples is None else int(self._num_examples(self._given(client)))


def _call_if_function(loader: Any) -> Loader:
    return loader() if callable(loader) and not isinstance(loader, Iterable) else loader


def batch_size(batch: Any) -> int | None:
    """Number of examples in a batch: the size of its tensors' first dimension; 1 without tensors, None if sizes differ.

    Graphs, boxes and other ragged examples are concatenated along a dimension that does not count them.
    """
    dimensions = set(_first_dimensions(batch))
    sizes = dimensions - {None}
    if len(sizes) == 1:
        return sizes.pop()
    return None if dimensions else 1


def _first_dimensions(batch: Any) -> Iterator[int | None]:
    """The first dimension of each array in a batch; None for an object that may hold any number of examples."""
    if isinstance(batch, Tensor | np.ndarray):
        if batch.ndim:
            yield len(batch)
    elif isinstance(batch, Mapping | list | tuple):
        for part in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _first_dimensions(part)
    elif not (batch is None or isinstance(batch, Number)):
        yield None


def count_batches(loader: Loader) -> int | None:
    """Number of batches in one pass; None for a loader without a length."""
    try:
        return len(loader)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        return None


def count_examples(loader: Any) -> int | None:
    """Number of examples that one pass over a ``DataLoader`` yields; None if it is unknown beforehand."""
    # Without automatic batching, a sampler that yields batches of indices reads whole batches from the data set.
    sampler = _batches_of(loader)
    # A custom batch sampler may yield any number of examples.
    return _length_of(sampler) if type(sampler) is BatchSampler else None


def likely_examples(loader: Any) -> int | None:
    """Number of examples of a pass if a custom batch sampler yields each once; None if unknown."""
    sampler = _batches_of(loader)
    if sampler is None or isinstance(loader.dataset, IterableDataset):
        return None
    found = _length_of(sampler)
    if found is None:
        with suppress(TypeError, NotImplementedError):
            return len(loader.dataset)
    return found


def _batches_of(loader: Any) -> Any:
    """The sampler that yields the indices of each batch of a ``DataLoader``; None for other loaders."""
    if not isinstance(loader, DataLoader):
        return None
    if loader.batch_sampler is None:
        return loader.sampler if isinstance(loader.sampler, BatchSampler) else None
    return loader.batch_sampler


def _length_of(batches: Any) -> int | None:
    """Number of examples in the batches of a batch sampler, from the length of its sampler."""
    try:
        size = len(batches.sampler)
    except (AttributeError, TypeError, NotImplementedError):
        return None
    return size // batches.batch_size * batches.batch_size if getattr(batches, "drop_last", False) else size
