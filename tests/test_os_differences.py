"""What differs between operating systems, also as Windows would do it."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from lightning_fl import os_differences
from lightning_fl.os_differences import flush_folder, is_of_another, lock_file, rights

PACKAGE = Path(os_differences.__file__).parent
POSIX_ONLY = re.compile(r"\b(fcntl|os\.(fchmod|fork|geteuid|getuid|uname)|import resource|import pwd)\b")


def test_a_file_is_locked_once() -> None:
    with open("lock", "w", encoding="utf-8") as first, open("lock", "w", encoding="utf-8") as second:
        lock_file(first.fileno(), wait=False)
        with pytest.raises(OSError, match="temporarily unavailable"):
            lock_file(second.fileno(), wait=False)
        first.close()
        lock_file(second.fileno(), wait=False)


def test_windows_locks_beyond_the_content(monkeypatch: pytest.MonkeyPatch) -> None:
    locked: list[tuple[str, int, int]] = []

    def locking(descriptor: int, mode: str, size: int) -> None:
        locked.append((mode, os.lseek(descriptor, 0, os.SEEK_CUR), size))

    monkeypatch.setattr(os_differences, "IS_WINDOWS", True)
    monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(locking=locking, LK_LOCK="wait", LK_NBLCK="try"))
    with open("journal", "w+b") as file:
        file.write(b"text")
        file.flush()
        lock_file(file.fileno(), wait=True)
        lock_file(file.fileno(), wait=False)
        assert os.lseek(file.fileno(), 0, os.SEEK_CUR) == 4
    assert [mode for mode, _, _ in locked] == ["wait", "try"]
    assert all(place > 1e9 and size == 1 for _, place, size in locked)


def test_rights_are_looked_at_where_they_mean_something(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("key").touch(mode=0o600)
    Path("key").chmod(0o644)
    status = Path("key").stat()
    assert rights(status) == 0o644
    assert not is_of_another(status)
    assert is_of_another(SimpleNamespace(st_uid=os.geteuid() + 1))  # type: ignore[arg-type]
    flush_folder(Path())
    monkeypatch.setattr(os_differences, "IS_WINDOWS", True)
    monkeypatch.delattr(os, "geteuid")
    assert rights(status) == 0
    assert not is_of_another(status)
    flush_folder(Path("no such folder"))


def test_what_only_posix_has_is_in_one_file() -> None:
    found = {
        str(path.relative_to(PACKAGE)): used[0]
        for path in sorted(PACKAGE.rglob("*.py"))
        if (used := POSIX_ONLY.search(path.read_text(encoding="utf-8")))
    }
    assert found.pop("os_differences.py") == "fcntl"  # so the pattern finds something
    assert found == {}
