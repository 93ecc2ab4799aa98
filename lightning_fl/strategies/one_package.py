"""Makes ``pytorch_lightning`` and ``lightning.pytorch``, the same code installed twice, a single package."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException

NAMES = {"pytorch_lightning": "lightning.pytorch", "lightning_fabric": "lightning.fabric"}

IMPORTED_FIRST = (
    "pytorch_lightning was imported before lightning_fl, and so its Trainer and modules are of other classes than "
    "lightning's, which a federation needs. Import lightning_fl first: then `import pytorch_lightning` gives "
    "lightning's classes, to every package that imports it."
)


class OnePackage(MetaPathFinder, Loader):
    """Imports ``lightning.pytorch`` for ``pytorch_lightning``, if both are installed in the same version.

    Otherwise each has its own classes, registries and loggers, which do not accept those of the other.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module of the same name in ``lightning``; None for all other modules."""
        if fullname.partition(".")[0] not in NAMES or not _are_the_same():
            return None
        return ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Imports the module of ``lightning``."""
        top, dot, rest = spec.name.partition(".")
        module = import_module(NAMES[top] + dot + rest)
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Leaves the module as it is; Python has replaced its specification, by which it would be reloaded."""
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state


def _are_the_same() -> bool:
    try:
        return version("pytorch-lightning") == version("lightning")
    except PackageNotFoundError:
        return False


def is_imported_apart() -> bool:
    """Whether ``pytorch_lightning`` has been imported as a separate package."""
    module = sys.modules.get("pytorch_lightning")
    return module is not None and module is not sys.modules.get("lightning.pytorch")


def unite(strategy_type: type, names: Sequence[str]) -> None:
    """Unites the two packages, or if it is too late makes ``pytorch_lightning`` explain what to write instead.

    Args:
        strategy_type: The federated strategy.
        names: The names under which strategies are registered.
    """
    if not is_imported_apart():
        if not any(isinstance(finder, OnePackage) for finder in sys.meta_path):
            sys.meta_path.insert(0, OnePackage())
        return
    warnings.warn(IMPORTED_FIRST, stacklevel=2)
    # Its Trainer would call both a name and an object an "invalid strategy"; once accepted, they reach `refuse_apart`.
    apart: Any = import_module("pytorch_lightning.strategies")
    apart.Strategy.register(strategy_type)
    for name in names:
        if name not in apart.StrategyRegistry:
            apart.StrategyRegistry.register(name, strategy_type, description=IMPORTED_FIRST)


def refuse_apart(accelerator: object) -> None:
    """Refuses a Trainer of a separate ``pytorch_lightning``, recognised by its accelerator.

    Raises:
        MisconfigurationException: If the Trainer is one.
    """
    if type(accelerator).__module__.startswith("pytorch_lightning"):
        raise MisconfigurationException(IMPORTED_FIRST)
