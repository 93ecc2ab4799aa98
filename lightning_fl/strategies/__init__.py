"""The Lightning plug-in: the strategy, and the names under which a Trainer finds it."""

from typing import Any

from lightning.pytorch.strategies import StrategyRegistry

from lightning_fl.algorithms import registered
from lightning_fl.privacy import SecureAggregation
from lightning_fl.strategies.federated import FederatedStrategy
from lightning_fl.strategies.one_package import unite

__all__ = ["FederatedStrategy", "register_strategies"]


def register_strategies() -> None:
    """Makes each registered algorithm known as ``Trainer(strategy=name)``, and ``secagg``: FedAvg over secure sums.

    The names are known to ``pytorch_lightning`` too.
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
