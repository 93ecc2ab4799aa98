"""Federated learning as a Lightning strategy: ``Trainer(strategy="fedavg")``."""

from importlib import import_module
from types import ModuleType

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
    topologies,
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
    "topologies",
]

_LAZY = ("cli", "communication", "data", "federation", "models", "strategies", "tracking")
"""Rooms that are imported when they are first used."""


def __getattr__(name: str) -> ModuleType:
    if name in _LAZY:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})


algorithms.load_entry_points()  # last, because they import this package
register_strategies()
