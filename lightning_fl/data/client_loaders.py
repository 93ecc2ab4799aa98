"""The clients' data: a lazy mapping from client id to its loader."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import BatchSampler, DataLoader

from lightning_fl.types import ClientId

Loader = Iterable[Any]


class ClientLoaders(Mapping[ClientId, Loader]):
    """Maps each client's id to the loader of its training data; a loader is made only when it is asked for.

    Args:
        clients: One of three forms. A mapping from id to a loader, or to a function without arguments that makes
            one; a sequence of loaders, whose ids are then ``0 .. n-1``; or, together with ``make_loader``, the ids.
        make_loader: Makes the loader of a client from its id, each time it is needed.
        num_examples: Tells how many examples one pass over a client's loader yields, without making the loader.
            Helps to spread many clients evenly over ranks. None: the loader is made and asked.

    Raises:
        ValueError: If there is no client, or an id stands twice.

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
        num_examples: Callable[[Any], int] | None = None,
    ) -> None:
        self._ids: Collection[ClientId]
        if make_loader is not None:
            self._ids = clients if isinstance(clients, range) else dict.fromkeys(clients)
            self._make = make_loader
        elif isinstance(clients, Mapping):
            self._ids = clients
            self._make = lambda client: _call_if_function(clients[client])
        elif isinstance(clients, Sequence):
            self._ids = range(len(clients))
            self._make = lambda client: clients[client]
        else:
            raise ValueError(
                f"ClientLoaders got {type(clients).__name__}; it takes a mapping of client id to loader, a sequence of "
                "loaders, or ids together with `make_loader`."
            )
        if len(self._ids) != len(clients):
            raise ValueError(f"Client ids must be unique: {len(clients)} were given, {len(self._ids)} differ.")
        if not self._ids:
            raise ValueError("ClientLoaders got no client; a federation needs at least one.")
        self._num_examples = num_examples

    def __getitem__(self, client: ClientId) -> Loader:
        if client not in self._ids:
            raise KeyError(client)
        return self._make(client)

    def __contains__(self, client: object) -> bool:
        return client in self._ids

    def __iter__(self) -> Iterator[ClientId]:
        return iter(self._ids)

    @property
    def ids(self) -> Collection[ClientId]:
        """The clients' ids in the order given."""
        return self._ids

    def __len__(self) -> int:
        return len(self._ids)

    def num_examples(self, client: ClientId) -> int | None:
        """Examples that one pass over the client's loader yields, or None if only the loader can tell."""
        return None if self._num_examples is None else self._num_examples(client)


def _call_if_function(loader: Any) -> Loader:
    return loader() if callable(loader) and not isinstance(loader, Iterable) else loader


def batch_size(batch: Any) -> int:
    """Number of examples in a batch: the first dimension of its first tensor; 1 if it holds none."""
    first = next((leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)), None)
    return len(first) if first is not None and first.dim() else 1


def count_batches(loader: Loader) -> int | None:
    """Number of batches of one pass, or None for a loader without length."""
    try:
        return len(loader)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        return None


def count_examples(loader: Any) -> int | None:
    """Number of examples that one pass over a ``DataLoader`` yields, or None if it can't be told beforehand."""
    sampler = getattr(loader, "batch_sampler", None)
    if not isinstance(loader, DataLoader) or type(sampler) is not BatchSampler:
        return None
    try:
        size = len(sampler.sampler)  # type: ignore[arg-type]
    except TypeError:
        return None
    return size // sampler.batch_size * sampler.batch_size if sampler.drop_last else size
