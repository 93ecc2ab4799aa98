from __future__ import annotations

import threading
from pathlib import Path

import pytest

from lightning_fl.coordinator.audit import AuditLog, verify


def make(path: Path, number: int = 5) -> list[bytes]:
    log = AuditLog(path)
    for index in range(number):
        log.append("event", number=index)
    return path.read_bytes().splitlines(keepends=True)


def test_a_whole_log_is_verified_and_goes_on_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    make(path)
    make(path, 2)
    number, last = verify(path)
    assert (number, len(last)) == (7, 64)


def test_lines_of_several_threads_follow_from_each_other(tmp_path: Path) -> None:
    log = AuditLog(tmp_path / "audit.jsonl")
    threads = [threading.Thread(target=lambda: [log.append("join") for _ in range(20)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verify(tmp_path / "audit.jsonl")[0] == 80


@pytest.mark.parametrize("change", ["changed", "taken out", "put in", "swapped"])
def test_a_log_that_was_tampered_with_is_found_out(tmp_path: Path, change: str) -> None:
    path = tmp_path / "audit.jsonl"
    lines = make(path)
    tampered = {
        "changed": [lines[0], lines[1].replace(b'"number": 1', b'"number": 7'), *lines[2:]],
        "taken out": [lines[0], *lines[2:]],
        "put in": [lines[0], lines[0], *lines[1:]],
        "swapped": [lines[1], lines[0], *lines[2:]],
    }[change]
    path.write_bytes(b"".join(tampered))
    with pytest.raises(ValueError, match="breaks at line"):
        verify(path)


def test_a_line_that_was_being_written_when_the_process_died_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    lines = make(path)
    path.write_bytes(b"".join(lines) + b'{"time": "2026')
    make(path, 1)
    assert verify(path)[0] == 6
