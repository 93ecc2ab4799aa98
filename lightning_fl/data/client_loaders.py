"""A lazy mapping from client id to the client's loader."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader

from lightning_fl.torch_internals import pytree
from lightning_fl.types import ClientId

Loader = Iterable[Any]


class ClientLoaders(Mapping[ClientId, Loader]):
    """Maps each client's id to the loader of its training data, which is created when it is looked up.

    Args:
        clients: One of three forms: a mapping from id to a loader, or to a function without arguments that creates
            one; a sequence of loaders, whose ids are then ``0 .. n-1``; or, together with ``make_loader``, the ids.
        make_loader: Creates a client's loader from its id; called at every lookup.
        num_examples: Returns the number of examples that one pass over a client's loader yields. None: the loader is
            created to find out, which is slow if many clients are balanced over ranks.

    Raises:
        ValueError: If there are no clients, or an id is repeated.

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
            # A dict keeps the order and finds an id in constant time; a range does so without listing a million ids.
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
                f"ClientLoaders got a {type(clients).__name__}; expected a mapping from client id to loader, a "
                "sequence of loaders, or ids together with `make_loader`."
            )
        if len(self._ids) != len(clients):
            raise ValueError(f"Client ids must be unique: found {len(self._ids)} different ids among {len(clients)}.")
        if not self._ids:
            raise ValueError("ClientLoaders got no clients; a federation needs at least one.")
        self._num_examples = num_examples

    def __getitem__(self, client: ClientId) -> Loader:
        # The user's function may well make a loader for an id that is not a client's.
        if client not in self._ids:
            raise KeyError(client)
        return self._make(client)

    def __contains__(self, client: object) -> bool:
        # `Mapping` would look the client up, and so create its loader.
        return client in self._ids

    def __iter__(self) -> Iterator[ClientId]:
        return iter(self._ids)

    @property
    def ids(self) -> Collection[ClientId]:
        """The clients' ids, in the given order."""
        return self._ids

    def __len__(self) -> int:
        return len(self._ids)

    def num_examples(self, client: ClientId) -> int | None:
        """Examples that one pass over the client's loader yields; None if that is unknown without the loader."""
        return None if self._num_examples is None else self._num_examples(client)


def _call_if_function(loader: Any) -> Loader:
    return loader() if callable(loader) and not isinstance(loader, Iterable) else loader


def batch_size(batch: Any) -> int:
    """Number of examples in a batch: the first dimension of its first tensor; 1 if it holds none."""
    first = next((leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)), None)
    return len(first) if first is not None and first.dim() else 1


def count_batches(loader: Loader) -> int | None:
    """Number of batches in one pass; None for a loader without a length."""
    try:
        return len(loader)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):
        return None


def count_examples(loader: Any) -> int | None:
    """Number of examples that one pass over a ``DataLoader`` yields; None if it is unknown beforehand."""
    sampler = getattr(loader, "batch_sampler", None)
    # A batch sampler of the user's own may yield any number of examples.
    if not isinstance(loader, DataLoader) or type(sampler) is not BatchSampler:
        return None
    try:
        size = len(sampler.sampler)  # type: ignore[arg-type]
    except TypeError:
        return None
    return size // sampler.batch_size * sampler.batch_size if sampler.drop_last else size
