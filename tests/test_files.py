"""Files appear whole or not at all."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest

from lightning_fl.files import write_whole


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError("disk full")

    write_whole(tmp_path / "a.json", b"old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        write_whole(tmp_path / "a.json", b"new")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"a.json": b"old"}
    write_whole(tmp_path / "a.json", b"new", durable=False)
    assert (tmp_path / "a.json").read_bytes() == b"new"


def test_what_may_not_be_replaced_stays(tmp_path: Path) -> None:
    write_whole(tmp_path / "key", b"first", replaces=False)
    with pytest.raises(FileExistsError):
        write_whole(tmp_path / "key", b"second", replaces=False)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"key": b"first"}


@pytest.mark.skipif(os.name == "nt", reason="Windows has other rights")
def test_its_owner_alone_may_read_it_from_the_first_byte_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda file: found.append(stat.S_IMODE(os.fstat(file).st_mode)))
    write_whole(tmp_path / "a", b"secret")
    assert found == [0o600]
