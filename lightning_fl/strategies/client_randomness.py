"""Reading a client's data with the client's own randomness."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import lightning as L
from torch import Tensor

from lightning_fl.algorithms import ProbeKind
from lightning_fl.clients.local_work import LocalWork
from lightning_fl.data.client_loaders import Loader
from lightning_fl.data.lazy_batches import as_lazy
from lightning_fl.data.prefetch import PrefetchedLoader, can_prefetch
from lightning_fl.data.splitting import in_order
from lightning_fl.federation.round_loader import one_pass
from lightning_fl.seeding import ClientRandomness, derive_seed, isolated_randomness
from lightning_fl.strategies.probe import probe
from lightning_fl.strategies.user_warnings import UserWarnings
from lightning_fl.types import ClientId


class ClientReading:
    """Seeds what a client draws from, in its loader and in its training.

    Args:
        trainer: The Trainer.
        seed: Seed of the federation.
        notices: Is told of each loader.
    """

    def __init__(self, trainer: L.Trainer, seed: int, notices: UserWarnings) -> None:
        self.trainer = trainer
        self.seed = seed
        self._notices = notices
        self._randomness = ClientRandomness()

    def prepare(self, round: int, client: ClientId, loader: Loader) -> Loader:
        """The loader to be read, and the client's randomness until :meth:`leave`."""
        self._notices.loader(loader)
        if self.trainer.overfit_batches > 0:  # type: ignore[attr-defined]
            loader = in_order(loader)
        self._enter(round, client, loader)
        return loader

    def prepare_together(self, round: int, client: ClientId, loader: Loader) -> Loader:
        """Like :meth:`prepare`, for a client that is read before it trains; a list needs no random numbers."""
        return loader if type(loader) in (list, tuple) else as_lazy(self.prepare(round, client, loader))

    def prefetch(self, round: int, client: ClientId, loader: Loader) -> Loader:
        """The loader of a client whose turn comes later; its workers, if it has some, read from now on."""
        if self.trainer.overfit_batches > 0 or not can_prefetch(loader):  # type: ignore[attr-defined]
            return loader
        with isolated_randomness(self.seed, round, client) as randomness:
            randomness.seed_loader(loader, derive_seed(self.seed, round, "loader", client))
            return PrefetchedLoader(loader)

    def enter(self, round: int, client: ClientId) -> None:
        """The client's randomness for its training, until :meth:`leave`."""
        self._randomness.enter(self.seed, round, client)

    def leave(self) -> None:
        """Puts all generators back."""
        self._randomness.exit()

    def make_probe(
        self, kind: ProbeKind | None, round: int, client: ClientId, loader: Loader, work: LocalWork
    ) -> Callable[[Mapping[str, Tensor]], Any] | None:
        """A function that measures what the algorithm's ``probe`` asks for; None if it asks for nothing."""
        if kind is None:
            return None

        def measure(params: Mapping[str, Tensor]) -> Any:
            self._enter(round, client, loader, "probe")
            measured = probe(self.trainer, kind, one_pass(loader, round * work.epochs, work), params)
            self._enter(round, client, loader)  # training sees the same random numbers as without a probe
            return measured

        return measure

    def _enter(self, round: int, client: ClientId, loader: Loader, purpose: str = "client") -> None:
        self._randomness.enter(self.seed, round, client, purpose)
        self._randomness.seed_loader(loader, derive_seed(self.seed, round, "loader", client))
