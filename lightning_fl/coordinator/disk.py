"""File operations that survive a power failure: each file appears whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning_fl.files import write_whole
from lightning_fl.os_differences import flush_folder


class Disk:
    """Every change that the coordinator, or a silo, makes to its folder.

    Args:
        before: Called with the name of each operation before it happens; tests let the process die there.
    """

    def __init__(self, before: Callable[[str], None] = lambda operation: None) -> None:
        self.before = before

    def make_folder(self, path: Path) -> Path:
        """Makes a folder that only its owner can read."""
        if not path.is_dir():
            self.before(f"make {path.name}")
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        return path

    def replace(self, source: Path, target: Path) -> None:
        """Gives a file its final name; the file must be on the disk already."""
        self.before(f"rename {target.name}")
        source.replace(target)
        self.before(f"flush {target.parent.name}")
        flush_folder(target.parent)

    def write_json(self, path: Path, value: Any) -> None:
        """Replaces a file."""
        self.before(f"write {path.name}")
        write_whole(path, json.dumps(value).encode(), mode=0o666)
        self.before(f"flush {path.parent.name}")
        flush_folder(path.parent)

    def delete(self, path: Path) -> None:
        """Deletes a file or a folder, if it is there."""
        self.before(f"delete {path.name}")
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def read_json(path: Path) -> Any:
    """The content of a file that :meth:`Disk.write_json` wrote; None if there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
