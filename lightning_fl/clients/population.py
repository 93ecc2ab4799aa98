"""All clients of a federation: their order, their data and their placement on ranks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import copy

from lightning_fl.clients.local_work import LocalWork
from lightning_fl.clients.placement import place_at_home, place_by_size
from lightning_fl.data.client_loaders import ClientLoaders, Loader, count_batches, count_examples
from lightning_fl.types import ClientId


class Population:
    """The clients of a federation, in an order that is the same on every rank.

    Args:
        loaders: The loaders of the clients whose data this rank holds.
        silos: Number of silos if each rank is one and holds only its own data; None in simulation.
    """

    def __init__(self, loaders: ClientLoaders, silos: int | None = None) -> None:
        self.loaders = loaders
        self.silos = silos
        self._number(_sorted(loaders) if silos is None else range(silos))

    def _number(self, ids: Sequence[ClientId]) -> None:
        self.ids = ids
        # A range finds a position by arithmetic, without a dict of a million entries.
        self._positions = None if isinstance(ids, range) else {client: i for i, client in enumerate(ids)}

    @classmethod
    def of_ranks(
        cls, loader: Loader, rank: int, ids: Sequence[ClientId], num_examples: int | None = None
    ) -> Population:
        """A population in which each rank is a silo; this rank holds only its own data.

        Args:
            loader: The loader of this rank's silo.
            rank: This rank.
            ids: The silos in the order of the ranks.
            num_examples: Number of examples of the silo, if the loader reads a part of them. None: those of the loader.
        """
        population = cls(_alone(ids[rank], loader, num_examples), silos=len(ids))
        population._number(ids)
        return population

    @classmethod
    def of_silo(cls, name: str, loader: Loader, num_examples: int | None = None) -> Population:
        """The population of a launch that is one silo of a federation over a network: a single client."""
        population = cls(_alone(name, loader, num_examples))
        population.silos = 1
        return population

    def with_loaders(self, loaders: ClientLoaders) -> Population:
        """The same clients with other loaders."""
        other = copy(self)
        other.loaders = loaders
        return other

    def __len__(self) -> int:
        return len(self.ids)

    def __contains__(self, client: object) -> bool:
        return client in (self.ids if self._positions is None else self._positions)

    def position(self, client: ClientId) -> int:
        """The client's position in the order of all clients."""
        return self.ids.index(client) if self._positions is None else self._positions[client]

    def place(
        self,
        cohort: Sequence[ClientId],
        num_ranks: int,
        at_home: bool,
        works: Mapping[ClientId, LocalWork] | None = None,
    ) -> list[list[ClientId]]:
        """Decides which rank trains which client of the cohort.

        Args:
            cohort: The clients of the round.
            num_ranks: Number of ranks.
            at_home: Whether placement is sticky, because clients keep state on their home rank.
            works: How much each client trains. None: one pass over its data.

        Returns:
            The clients of each rank.
        """
        # Silo i is rank i, and no other rank has its data.
        if at_home or self.silos is not None:
            return place_at_home(cohort, self.position, num_ranks)
        if works is None:
            return place_by_size(cohort, self._size, num_ranks)
        return place_by_size(cohort, lambda client: works[client].load(self._size(client)), num_ranks)

    def num_examples(self, client: ClientId, loader: Loader) -> int | None:
        """Examples that one pass over the client's loader yields, or None if that is unknown before training."""
        declared = self.loaders.num_examples(client)
        return count_examples(loader) if declared is None else declared

    def all_sizes(self) -> list[int] | None:
        """Examples of each client in the order of ``ids``, or None if this rank can't know them before training."""
        if self.silos is not None:
            return None
        sizes: list[int] = []
        for client in self.ids:
            declared = self.loaders.num_examples(client)
            size = count_examples(self.loaders[client]) if declared is None else declared
            if size is None:
                return None
            sizes.append(size)
        return sizes

    def known_sizes(self) -> dict[ClientId, int]:
        """Examples of those clients of which this rank knows them before training."""
        sizes = {client: self.num_examples(client, self.loaders[client]) for client in self.loaders}
        return {client: size for client, size in sizes.items() if size is not None}

    def max_examples(self) -> int | None:
        """Examples of the largest client; None for silos, whose sizes are private, and if a size is not declared."""
        if self.silos is not None:
            return None
        # Declared sizes only: creating every client's loader for an upper bound would cost too much.
        sizes = [self.loaders.num_examples(client) for client in self.ids]
        return None if None in sizes else max(sizes)  # type: ignore[type-var]

    def _size(self, client: ClientId) -> float:
        declared = self.loaders.num_examples(client)
        if declared is not None:
            return declared
        loader = self.loaders[client]  # creating a loader can be expensive, so only if no size was declared
        return count_examples(loader) or count_batches(loader) or 1


def _alone(client: ClientId, loader: Loader, num_examples: int | None) -> ClientLoaders:
    declared = None if num_examples is None else {client: num_examples}.__getitem__
    return ClientLoaders({client: loader}, num_examples=declared)


def _sorted(ids: Iterable[ClientId]) -> Sequence[ClientId]:
    # A range is sorted already, and a million simulated clients stay a range instead of becoming a list.
    declared = getattr(ids, "ids", None)
    if isinstance(declared, range) and declared.step > 0:
        return declared
    # Numbers and names can't be compared with each other, so they are sorted by type first.
    return sorted(ids, key=lambda client: (type(client).__name__, client))
