"""The tutorials of docs/howto on parts of one's own: their modules, their tests, and their line in a contract suite."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.helpers.distributed import REPOSITORY
from tests.helpers.documents import imported_blocks, named_blocks

TUTORIALS = ("aggregator", "transform", "partitioner", "transport")
LIST = "ENTRIES = {"


def checks_of(module: ModuleType) -> list[Callable[..., None]]:
    return [value for name, value in vars(module).items() if name.startswith("test_") and callable(value)]


def suite_with(line: str, path: str, defined: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A contract suite with one line more in its list of entries, as the tutorial's reader writes it."""
    source = (REPOSITORY / path).read_text()
    assert source.count(LIST) == 1
    suite = ModuleType("suite_with_one_entry_more")
    monkeypatch.setitem(sys.modules, suite.__name__, suite)
    vars(suite).update(defined)
    exec(compile(source.replace(LIST, f"{LIST}\n{line}"), path, "exec"), vars(suite))
    return suite


def rows_of(mark: pytest.Mark) -> list[dict[str, Any]]:
    """The values of a `parametrize`, by name."""
    names, values = mark.args[:2]
    names = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
    rows = [value.values if hasattr(value, "marks") else value if len(names) > 1 else (value,) for value in values]
    return [dict(zip(names, row, strict=True)) for row in rows]


def cases_of(suite: ModuleType, name: str) -> Iterator[tuple[Callable[..., None], dict[str, Any]]]:
    """The tests of a suite that take its entry ``name``, with their arguments."""
    for test in checks_of(suite):
        tables = [rows_of(mark) for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"]
        for rows in product(*tables):
            arguments = {key: value for row in rows for key, value in row.items()}
            if arguments.get("entry") is suite.ENTRIES[name] or arguments.get("name") == name:
                yield test, arguments


@pytest.mark.parametrize("tutorial", TUTORIALS)
@pytest.mark.spread(2)
def test_the_example_works_and_keeps_the_contract(
    tutorial: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = REPOSITORY / "docs" / "howto" / f"{tutorial}.md"
    ((path, line),) = [item for item in named_blocks(page).items() if item[0].startswith("tests/contract/")]
    with imported_blocks(page, tmp_path / "site") as modules:
        example, its_test = modules.values()
        assert Path(its_test.__file__ or "").name == f"test_{Path(example.__file__ or '').name}"
        tests = checks_of(its_test)
        assert tests
        for test in tests:
            test()
        suite = suite_with(line, path, {**vars(example), **vars(its_test)}, monkeypatch)
        cases = list(cases_of(suite, next(iter(suite.ENTRIES))))
        assert len({test for test, _ in cases}) >= 5
        for test, arguments in cases:
            print(test.__name__, arguments)  # pytest shows it if the test fails
            with pytest.MonkeyPatch.context() as own_patches:
                wants = {"monkeypatch": own_patches} if "monkeypatch" in inspect.signature(test).parameters else {}
                test(**arguments, **wants)
