"""How attackers enter a simulated federation."""

from __future__ import annotations

from abc import ABC, abstractmethod

from lightning_fl.aggregation.aggregator import Aggregator
from lightning_fl.data.client_loaders import ClientLoaders


class Corruption(ABC):
    """What some clients do to a simulated federation; ``fl.attacks.Adversary`` is one."""

    @abstractmethod
    def wrap_loaders(self, loaders: ClientLoaders, seed: int) -> ClientLoaders:
        """Returns the loaders with which the clients train."""

    @abstractmethod
    def wrap_aggregator(self, aggregator: Aggregator) -> Aggregator:
        """Returns an aggregator that receives what the attackers send."""
