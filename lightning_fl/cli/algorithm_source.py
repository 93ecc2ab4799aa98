"""Documentation and settings of the built-in algorithms, read from their files, since importing them takes seconds."""

from __future__ import annotations

import ast
import inspect
from contextlib import suppress
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "algorithms"


@cache
def classes() -> dict[str, ast.ClassDef]:
    """The classes of all algorithm files, by name."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in FOLDER.glob("*.py")]
    return {node.name: node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)}


def names() -> dict[str, ast.ClassDef]:
    """The classes decorated with ``@register``, by registered name."""
    found = {}
    for node in classes().values():
        for mark in node.decorator_list:
            if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "register":
                found[ast.literal_eval(mark.args[0])] = node
    return found


def documentation(node: ast.ClassDef) -> str:
    """The docstring of a class."""
    return inspect.cleandoc(ast.get_docstring(node) or "")


def settings(node: ast.ClassDef) -> dict[str, object]:
    """The default of each hyper-parameter that is a plain value, by name; those of base classes come first."""
    found: dict[str, object] = {}
    for base in reversed(node.bases):
        if isinstance(base, ast.Name) and base.id in classes():
            found |= settings(classes()[base.id])
    is_dataclass = any("dataclass" in ast.unparse(mark) for mark in node.decorator_list)
    for line in node.body if is_dataclass else ():
        if not isinstance(line, ast.AnnAssign) or not line.value or "ClassVar" in ast.unparse(line.annotation):
            continue
        with suppress(ValueError):  # not a plain value but an object, such as a topology
            found[ast.unparse(line.target)] = ast.literal_eval(line.value)
    return found
