"""The Lightning plug-in: the strategy, and the names under which a Trainer accepts it."""

from typing import Any

from lightning.pytorch.strategies import StrategyRegistry

from lightning_fl.algorithms import registered
from lightning_fl.privacy import SecureAggregation
from lightning_fl.strategies.federated import FederatedStrategy
from lightning_fl.strategies.one_package import unite

__all__ = ["FederatedStrategy", "register_strategies"]


def register_strategies() -> None:
    """Registers each algorithm as ``Trainer(strategy=name)``, and ``secagg``: FedAvg with secure aggregation.

    The names are registered with ``pytorch_lightning`` too.
    """
    for name, algorithm in registered().items():
        if name not in StrategyRegistry:
            description = f"Federation with {algorithm.__name__}"
            StrategyRegistry.register(name, FederatedStrategy, description=description, algorithm=name)
    if "secagg" not in StrategyRegistry:
        StrategyRegistry.register("secagg", secagg, description="Federation with FedAvg over secure sums")
    unite(FederatedStrategy, [*registered(), "secagg"])


def secagg(**settings: Any) -> FederatedStrategy:
    """FedAvg whose updates are summed securely."""
    return FederatedStrategy("fedavg", aggregator=SecureAggregation(), **settings)


register_strategies()
