"""Federated learning as a Lightning strategy: ``Trainer(strategy="fedavg")``."""

import sys
from importlib import import_module
from pathlib import PurePath
from typing import TYPE_CHECKING

from lightning_fl.lazy import lazy_names

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lightning_fl import (
        adapters,
        aggregation,
        algorithms,
        analytics,
        attacks,
        audit,
        callbacks,
        cli,
        clients,
        communication,
        compression,
        data,
        datamodules,
        devices,
        engines,
        federation,
        models,
        privacy,
        schedules,
        serving,
        silos,
        strategies,
        topologies,
        tracking,
        vertical,
    )
    from lightning_fl.strategies import FederatedStrategy
    from lightning_fl.strategies.checkpoint import load_client

__all__ = [
    "FederatedStrategy",
    "__version__",
    "adapters",
    "aggregation",
    "algorithms",
    "analytics",
    "attacks",
    "audit",
    "callbacks",
    "cli",
    "clients",
    "communication",
    "compression",
    "data",
    "datamodules",
    "devices",
    "engines",
    "federation",
    "load_client",
    "models",
    "privacy",
    "schedules",
    "serving",
    "silos",
    "strategies",
    "topologies",
    "tracking",
    "vertical",
]

_IN_YAML = (
    "adapters",
    "aggregation",
    "algorithms",
    "attacks",
    "callbacks",
    "clients",
    "datamodules",
    "engines",
    "privacy",
    "schedules",
    "silos",
    "topologies",
)
"""Rooms whose classes YAML may write without their module, which jsonargparse allows for imported classes."""

__getattr__, __dir__ = lazy_names(__name__)


def register() -> None:
    """Registers the strategies' names, with the algorithms of installed packages, and imports what YAML may name."""
    for room in _IN_YAML:
        import_module(f"{__name__}.{room}")
    privacy = import_module(f"{__name__}.privacy")
    for name in privacy.__all__:  # which are lazy
        getattr(privacy, name)
    import_module(f"{__name__}.algorithms").load_entry_points()  # last, because they import this package
    import_module(f"{__name__}.strategies").register_strategies()


def _is_command_line() -> bool:
    """Whether this process is ``lightning-fl`` or ``python -m lightning_fl``: each command imports what it needs."""
    program = sys.argv[0] if sys.argv else ""
    if program == "-m":  # what Python puts there while it looks for the module
        return sys.orig_argv[sys.orig_argv.index("-m") + 1] == __name__
    return PurePath(program).stem == "lightning-fl"


if not _is_command_line():
    register()
