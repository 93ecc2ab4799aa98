"""Opens the clients' loaders when they are needed, and starts the next client's workers in advance."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from lightning_fl.clients import Population
from lightning_fl.data.client_loaders import Loader
from lightning_fl.data.lazy_batches import as_lazy
from lightning_fl.data.prefetch import PrefetchedLoader, can_prefetch
from lightning_fl.data.splitting import in_order
from lightning_fl.federation import ClientBatches, LoaderFailed, RankPlan
from lightning_fl.seeding import ClientRandomness, isolated_randomness, visit_seed
from lightning_fl.strategies.user_warnings import UserWarnings
from lightning_fl.types import ClientId

UNKNOWN_LENGTH = sys.maxsize // 2

VISITS_APART = 1 << 24
"""A number of rounds larger than that of any run."""
ClientVisit = tuple[ClientId, int]
"""A client, and the number of its earlier visits in the round."""


class RoundLoaders:
    """Opens the loaders of a round's clients.

    Args:
        plan: The plan of this rank for the round.
        population: All clients.
        seed: Seed of the federation.
        following: Returns the client's visit that trains after a given one; None if there is none.
        restore_randomness: Restores the random generators' states from before the round's first client.
        keep_order: Whether loaders that shuffle are read in order, as ``overfit_batches`` requires.
        warnings: Checks each loader for settings that need a warning.
    """

    def __init__(
        self,
        plan: RankPlan,
        population: Population,
        seed: int,
        following: Callable[[ClientVisit], ClientVisit | None],
        restore_randomness: Callable[[], None],
        keep_order: bool,
        warnings: UserWarnings,
    ) -> None:
        self.plan = plan
        self.population = population
        self.seed = seed
        self.following = following
        self.restore_randomness = restore_randomness
        self.keep_order = keep_order
        self.warnings = warnings
        self._planned = dict(plan.loaders)
        self._ahead: dict[ClientVisit, Loader] = {}
        self._randomness = ClientRandomness()
        self._read: list[ClientBatches] = []

    @property
    def seconds_waiting(self) -> float:
        """Seconds that training has waited for the clients' data."""
        return sum(batches.seconds_waiting for batches in self._read)

    def open(self, client: ClientId, works: Any, number: int = 0) -> ClientBatches:
        """A client's batches, to be read while it trains.

        Args:
            client: The client.
            works: Its local work, phase by phase.
            number: Number of earlier visits of the client in the round.

        Raises:
            LoaderFailed: If its loader can't be created.
        """
        return self._batches((client, number), self._take((client, number)), works)

    def open_ahead(self, client: ClientId, works: Any, number: int = 0) -> ClientBatches:
        """A client's batches, to be read before it trains; the random generators are the client's until :meth:`leave`.

        Args:
            client: The client.
            works: Its local work, phase by phase.
            number: Number of earlier visits of the client in the round.

        Raises:
            LoaderFailed: If its loader can't be created.
        """
        loader, seed = self._take((client, number)), visit_seed(self.seed, number)
        if type(loader) not in (list, tuple):  # reading these draws no random numbers
            self._randomness.enter(seed, self.plan.round, client)
            self._randomness.seed_loader(loader, seed, self.plan.round, client)
            loader = as_lazy(loader)
        return self._batches((client, number), loader, works)

    def leave(self) -> None:
        """Restores the random generators."""
        self._randomness.exit()

    def _batches(self, visit: ClientVisit, loader: Loader, works: Any) -> ClientBatches:
        client, number = visit
        # Passes of further visits are numbered beyond those of any round.
        index = self.plan.round + number * VISITS_APART
        batches = ClientBatches(client, loader, works, index, self.plan.max_work, on_first_batch=self._start_workers)
        self._read.append(batches)
        return batches

    def _take(self, visit: ClientVisit) -> Loader:
        client, _ = visit
        try:
            # The user's code creates the loader, so any error may be raised; the message names the client.
            loader = self._ahead.pop(visit) if visit in self._ahead else self._make(client)
        except Exception as error:
            raise LoaderFailed(client, error) from error
        # Only with workers: without them an early loader would save nothing and keep its data in memory.
        if isinstance(loader, PrefetchedLoader) or can_prefetch(loader):
            self._make_next(visit)
        self.warnings.loader(loader)
        return in_order(loader) if self.keep_order else loader

    def _make(self, client: ClientId) -> Loader:
        if client in self._planned:
            return self._planned.pop(client)
        # Loaders that draw random numbers at their creation must not draw the previous client's.
        self.leave()
        self.restore_randomness()
        return self.population.loaders[client]

    def _make_next(self, visit: ClientVisit) -> None:
        # Runs before this client is seeded, so that a loader made here does not draw this client's random numbers.
        following = self.following(visit)
        if following is not None and not self._ahead:
            with suppress(Exception):  # raised again, with the client named, when the loader is needed
                self._ahead[following] = self._make(following[0])

    def _start_workers(self) -> None:
        """Starts the next client's workers, which read while the current client trains."""
        for visit, loader in self._ahead.items():
            if self.keep_order or not can_prefetch(loader):
                continue
            client, seed = visit[0], visit_seed(self.seed, visit[1])
            with suppress(Exception), isolated_randomness(seed, self.plan.round, client) as randomness:
                randomness.seed_loader(loader, seed, self.plan.round, client)
                self._ahead[visit] = PrefetchedLoader(loader)

    def close(self) -> None:
        """Drops the loaders that were created in advance, because the round ends."""
        self._ahead.clear()
        self.leave()


class RoundLoader:
    """The empty training loader that Lightning gets; the strategy's epoch loop reads the clients' own loaders.

    Args:
        num_batches: Returns the number of batches of this rank in the round; None if it is unknown.
    """

    def __init__(self, num_batches: Callable[[], int | None]) -> None:
        self._num_batches = num_batches

    def __len__(self) -> int:
        num_batches = self._num_batches()
        return UNKNOWN_LENGTH if num_batches is None else num_batches

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __reduce__(self) -> tuple[Any, ...]:
        # A Trainer keeps its loader after a fit; a copy does not take part in the rounds.
        return RoundLoader, (_unknown,)


def _unknown() -> None:
    return None
