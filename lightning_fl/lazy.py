"""Names that a package exports and imports only when they are first used."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any


def lazy_names(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The ``__getattr__`` and ``__dir__`` of a package whose names are imported when they are first used.

    The names are those that ``if TYPE_CHECKING:`` imports in the package's ``__init__.py``: what type checkers and
    readers see is the only list. They may be the package's own modules.

    Args:
        package: ``__name__`` of the package.
    """
    module = sys.modules[package]
    homes = _names_for_type_checkers(Path(str(module.__file__)).read_text(encoding="utf-8"))

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        home = homes[name]
        value = import_module(f"{package}.{name}") if home == package else getattr(import_module(home), name)
        setattr(module, name, value)  # found there next time
        return value

    return get, lambda: sorted({*vars(module), *homes})


def _names_for_type_checkers(source: str) -> dict[str, str]:
    """For each name, the module from which ``if TYPE_CHECKING:`` imports it."""
    blocks = [
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    imports = [node for block in blocks for node in block.body if isinstance(node, ast.ImportFrom)]
    return {alias.name: str(node.module) for node in imports for alias in node.names}
