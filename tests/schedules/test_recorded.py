"""Rounds that a coordinator has recorded, planned again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_fl.clients import Between, Population
from lightning_fl.datamodules import ClientLoaders
from lightning_fl.schedules import Buffered, Clients, Clock, Polynomial, Recorded, Visit

HISTORY: list[dict[str, Any]] = [
    {"round": 0, "members": ["a", "b"], "versions": {"a": 0, "b": 0}},
    {"round": 1, "members": ["a", "c"], "versions": {"a": 1, "c": 0}},
    {"round": 2, "members": ["b"]},  # of a federation that waits: without versions
]


@pytest.fixture
def folder(tmp_path: Path) -> str:
    (tmp_path / "state.json").write_text(json.dumps({"progress": {"history": HISTORY}}))
    return str(tmp_path)


def clients(*names: str) -> Clients:
    return Clients(Population(ClientLoaders({name: [] for name in names})), None, lambda index: [])


def test_it_takes_in_what_was_taken_in_and_keeps_the_versions_that_come_later(folder: str) -> None:
    own, clock, seen = Recorded(folder), Clock(), []
    for _ in HISTORY:
        flush, clock = own.next(clock, clients("a", "b", "c"))
        seen.append((flush.visits, clock.versions))
    assert seen == [
        ([Visit("a", 0), Visit("b", 0)], {0}),
        ([Visit("a", 1), Visit("c", 0)], set()),
        ([Visit("b", 2)], set()),
    ]
    with pytest.raises(ValueError, match="max_epochs=3"):
        own.next(clock, clients("a", "b", "c"))


def test_what_can_not_be_replayed_is_refused(folder: str, tmp_path: Path) -> None:
    own = Recorded(folder, Buffered(2, staleness=Polynomial(0.5)))
    assert len(own.transforms) == 1
    with pytest.raises(ValueError, match="which have no loader"):
        own.next(Clock(version=1), clients("a", "b"))
    with pytest.raises(ValueError, match="learning-rate schedule"):
        own.check_learning_rates()
    with pytest.raises(ValueError, match="drew its amount of work itself"):
        own.check_work(None, Between(1, 5))
    with pytest.raises(ValueError, match="would be ignored"):
        own.clients_per_round(2)
    with pytest.raises(ValueError, match="folder of a coordinator"):
        Recorded(str(tmp_path / "nothing")).check(3)
