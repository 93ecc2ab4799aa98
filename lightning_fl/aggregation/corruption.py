"""The interface through which simulated attackers enter a federation."""

from __future__ import annotations

from abc import ABC, abstractmethod

from lightning_fl.aggregation.aggregator import Aggregator
from lightning_fl.data.client_loaders import ClientLoaders


class Corruption(ABC):
    """Corrupts the data or updates of some clients of a simulation; ``fl.attacks.Adversary`` is one."""

    @abstractmethod
    def wrap_loaders(self, loaders: ClientLoaders, seed: int) -> ClientLoaders:
        """Returns the loaders on which the clients train."""

    @abstractmethod
    def wrap_aggregator(self, aggregator: Aggregator) -> Aggregator:
        """Returns an aggregator that also receives the attackers' updates."""
