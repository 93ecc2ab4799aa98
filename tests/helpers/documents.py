"""The code blocks of Markdown pages: plain ones run in order, and named ones are the files of a worked example.

A block is named by a comment on the line before it, such as ``<!-- trimmed_mean.py -->``.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType


def blocks(page: Path, language: str) -> list[str]:
    """The blocks in a language that have no name."""
    return re.findall(rf"(?<!-->\n)^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def named_blocks(page: Path) -> dict[str, str]:
    """The blocks that have a name, by name."""
    return dict(re.findall(r"^<!-- (\S+) -->\n```\w+\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL))


def install(folder: Path, files: Mapping[str, str], entry_points: str = "") -> None:
    """Puts modules into a new folder and, if there are entry points, a distribution's metadata, as pip does."""
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    if entry_points:
        info = folder / "fake-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fake\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(entry_points)


@contextmanager
def imported_blocks(page: Path, folder: Path) -> Iterator[dict[str, ModuleType]]:
    """The modules among the named blocks of a page, by file name; inside the block they can be imported."""
    files = {name: text for name, text in named_blocks(page).items() if re.fullmatch(r"\w+\.py", name)}
    install(folder, files)
    sys.path.insert(0, str(folder))
    try:
        yield {name: importlib.import_module(name.removesuffix(".py")) for name in files}
    finally:
        sys.path.remove(str(folder))
        for name in files:
            sys.modules.pop(name.removesuffix(".py"), None)
