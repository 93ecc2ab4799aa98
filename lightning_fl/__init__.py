"""Federated learning as a Lightning strategy: ``Trainer(strategy="fedavg")``."""

from lightning_fl import (
    aggregation,
    algorithms,
    attacks,
    callbacks,
    clients,
    compression,
    datamodules,
    engines,
    privacy,
)
from lightning_fl.strategies import FederatedStrategy, register_strategies
from lightning_fl.strategies.checkpoint import load_client

__version__ = "0.1.0"

__all__ = [
    "FederatedStrategy",
    "__version__",
    "aggregation",
    "algorithms",
    "attacks",
    "callbacks",
    "clients",
    "compression",
    "datamodules",
    "engines",
    "load_client",
    "privacy",
]

algorithms.load_entry_points()  # last, because they import this package
register_strategies()
