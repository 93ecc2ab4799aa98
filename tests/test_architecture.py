"""Dependencies point one way, and only one file touches what Lightning keeps private."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import lightning_fl

PACKAGE = Path(lightning_fl.__file__).parent
INTERNALS = [PACKAGE / "strategies" / f"{name}.py" for name in ("internals", "results")]
MAX_LINES = 500

LIGHTNING = ("lightning", "pytorch_lightning", "lightning_fabric", "lightning_utilities")
ON_TOP = tuple(f"lightning_fl.{room}" for room in ("callbacks", "cli", "datamodules", "models", "tracking"))
WITHOUT_LIGHTNING = (*LIGHTNING, "lightning_fl.strategies", *ON_TOP)
FORBIDDEN = {
    "types.py": WITHOUT_LIGHTNING,
    "tree.py": WITHOUT_LIGHTNING,
    "optimizer_tree.py": WITHOUT_LIGHTNING,
    "algorithms": (*WITHOUT_LIGHTNING, "torch.distributed"),
    "aggregation": WITHOUT_LIGHTNING,
    "clients": WITHOUT_LIGHTNING,
    "communication": WITHOUT_LIGHTNING,
    "engines": WITHOUT_LIGHTNING,
    "privacy": WITHOUT_LIGHTNING,
    "strategies": ON_TOP,
}
LIGHTNING_OBJECTS = {"trainer", "lightning_module", "pl_module", "fit_loop", "epoch_loop"}

Finding = tuple[int, str]


def imported_names(tree: ast.AST) -> Iterator[Finding]:
    """The line and full name of everything imported, wherever in the file it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import; write the full name"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def is_below(name: str, module: str) -> bool:
    return name == module or name.startswith(f"{module}.")


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def forbidden_imports(source: str, forbidden: tuple[str, ...]) -> list[Finding]:
    return [
        (line, name)
        for line, name in imported_names(ast.parse(source))
        if any(is_below(name, module) for module in forbidden)
    ]


def private_touches(source: str) -> list[Finding]:
    """Imports of Lightning's private names, and private attributes of a Trainer, its loops and modules."""
    tree = ast.parse(source)
    touches = [
        (line, name)
        for line, name in imported_names(tree)
        if any(is_below(name, module) for module in LIGHTNING) and any(map(is_private, name.split(".")))
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            owner = ast.unparse(node.value)
            if LIGHTNING_OBJECTS & set(owner.replace("(", ".").replace(")", ".").split(".")):
                touches.append((node.lineno, f"{owner}.{node.attr}"))
    return touches


def report(findings: dict[Path, list[Finding]]) -> str:
    return "\n".join(
        f"{path.relative_to(PACKAGE.parent)}:{line}: {name}" for path, found in findings.items() for line, name in found
    )


@pytest.mark.parametrize("room", FORBIDDEN)
def test_dependencies_point_one_way(room: str) -> None:
    files = [PACKAGE / room] if room.endswith(".py") else sorted((PACKAGE / room).rglob("*.py"))
    findings = {path: forbidden_imports(path.read_text(), FORBIDDEN[room]) for path in files}
    assert not any(findings.values()), f"{room} must not import:\n{report(findings)}"


def test_only_one_file_touches_what_lightning_keeps_private() -> None:
    findings = {
        path: private_touches(path.read_text()) for path in sorted(PACKAGE.rglob("*.py")) if path not in INTERNALS
    }
    assert not any(findings.values()), f"belongs into {INTERNALS[0].name}:\n{report(findings)}"


def test_files_stay_readable() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")}
    assert {str(path): length for path, length in lengths.items() if length > MAX_LINES} == {}


def test_forbidden_imports_are_found() -> None:
    source = "import lightning as L\ndef f():\n    from torch import distributed\nfrom lightning_fl.types import Tree\n"
    assert forbidden_imports(source, FORBIDDEN["algorithms"]) == [(1, "lightning"), (3, "torch.distributed")]


@pytest.mark.parametrize(
    ("source", "num_touches"),
    [
        ("from lightning.pytorch.loops.utilities import _is_max_limit_reached", 1),
        ("from lightning.pytorch.trainer import Trainer", 0),
        ("self.trainer._accelerator_connector.use_distributed_sampler = False", 1),
        ("self.lightning_module.trainer.fit_loop._data_fetcher", 1),
        ("trainer.fit_loop.epoch_loop.__class__", 0),
        ("self._trainer_name + other._value", 0),
    ],
)
def test_private_touches_are_found(source: str, num_touches: int) -> None:
    assert len(private_touches(source)) == num_touches
