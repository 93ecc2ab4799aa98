"""Lines of code of each algorithm, without docstrings, imports, comments and blanks.

Run it with ``python benchmarks/algorithm_lines.py``.

Where several algorithms stand in one file, it is the file that is counted.
"""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

from lightning_fl.algorithms import Algorithm, registered


def code_lines(source: str) -> int:
    """The lines of code in a Python source."""
    tree = ast.parse(source)
    left_out: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            left_out.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
        body = getattr(node, "body", None)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            left_out.update(
                line
                for index, own in enumerate(body or [])
                if isinstance(own, ast.Expr)
                and isinstance(own.value, ast.Constant)
                and isinstance(own.value.value, str)
                if index == 0 or isinstance(node, ast.ClassDef | ast.Module)
                for line in range(own.lineno, (own.end_lineno or own.lineno) + 1)
            )
    lines = source.splitlines()
    kept = (line for number, line in enumerate(lines, start=1) if number not in left_out)
    return sum(bool(line.strip()) and not line.strip().startswith("#") for line in kept)


def table() -> dict[str, tuple[list[str], int]]:
    """By file the names of its algorithms, and its lines."""
    files: dict[str, list[str]] = {}
    for name, algorithm in registered().items():
        files.setdefault(inspect.getfile(algorithm), []).append(name)
    base = inspect.getfile(Algorithm)
    rows = {
        Path(file).name: (names, code_lines(Path(file).read_text(encoding="utf-8"))) for file, names in files.items()
    }
    return {**rows, Path(base).name: (["what all share"], code_lines(Path(base).read_text(encoding="utf-8")))}


if __name__ == "__main__":
    for file, (names, num_lines) in sorted(table().items(), key=lambda row: row[1][1]):
        print(f"{num_lines:4d}  {', '.join(names):40s} {file}")
