"""The journal between processes and after damage."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from lightning_fl.privacy.secagg import RetryRefused
from lightning_fl.privacy.secagg.journal import Journal

VECTOR_ID, ROSTER, OTHER = b"v" * 32, b"r" * 32, b"o" * 32


def test_two_runs_of_one_silo_at_the_same_time(tmp_path: Path) -> None:
    first, second = Journal(tmp_path / "sent"), Journal(tmp_path / "sent")
    first.claim(VECTOR_ID, ROSTER)
    second.claim(VECTOR_ID, ROSTER)
    assert len((tmp_path / "sent").read_text().splitlines()) == 1
    with pytest.raises(RetryRefused):
        second.claim(VECTOR_ID, OTHER)


def test_one_of_many_claims_at_once_wins(tmp_path: Path) -> None:
    """Each opens the file for itself, so the lock parts threads as it does processes."""
    journals = [Journal(tmp_path / "sent") for _ in range(8)]
    start, won = threading.Barrier(len(journals)), []

    def claim(number: int) -> None:
        start.wait()
        try:
            journals[number].claim(VECTOR_ID, bytes([number]) * 32)
        except RetryRefused:
            return
        won.append(number)

    threads = [threading.Thread(target=claim, args=(number,)) for number in range(len(journals))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert (tmp_path / "sent").read_text() == f"{VECTOR_ID.hex()} {(bytes(won) * 32).hex()}\n"


@pytest.mark.parametrize(
    "damage",
    ["aa" * 10, f"{VECTOR_ID.hex()} ", f"{VECTOR_ID.hex()} 12ab", f"{VECTOR_ID.hex()} xx\n", "\n", "a b c\n", "\xff\n"],
)
def test_a_damaged_file_is_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "sent"
    journal = Journal(path)
    path.write_text(damage, encoding="latin-1")
    with pytest.raises(ValueError, match=r"Line 1 of .*sent is damaged"):
        Journal(path)
    with pytest.raises(ValueError, match=r"Line 1 of .*sent is damaged"):
        journal.claim(VECTOR_ID, ROSTER)
    assert path.read_text(encoding="latin-1") == damage


def test_two_rosters_of_one_vector_in_the_file_are_damage(tmp_path: Path) -> None:
    (tmp_path / "sent").write_text(f"{VECTOR_ID.hex()} {ROSTER.hex()}\n{VECTOR_ID.hex()} {OTHER.hex()}\n")
    with pytest.raises(ValueError, match="Line 2"):
        Journal(tmp_path / "sent")


def test_a_last_line_without_its_end_stays_a_line(tmp_path: Path) -> None:
    (tmp_path / "sent").write_text(f"{OTHER.hex()} {ROSTER.hex()}")
    Journal(tmp_path / "sent").claim(VECTOR_ID, ROSTER)
    again = Journal(tmp_path / "sent")
    for vector_id in (VECTOR_ID, OTHER):
        with pytest.raises(RetryRefused):
            again.claim(vector_id, OTHER)
