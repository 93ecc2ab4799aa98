"""The coordinator dies, or has no space, before any of its file operations: there is the old round or the new one."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_fl.algorithms import FedAvgM
from lightning_fl.coordinator import wire
from lightning_fl.coordinator.audit import AuditLog, verify
from lightning_fl.coordinator.disk import Disk
from lightning_fl.coordinator.service import START, UPDATE, Coordinator
from lightning_fl.coordinator.store import Store
from lightning_fl.federation import RankReport
from lightning_fl.tree import flatten
from tests.helpers.network import NAMES, Died, rules, settings

STEPS = {"east": 1.0, "north": 2.0, "south": 6.0}


class Power:
    """Goes out before a certain operation.

    Args:
        last: How many operations still happen. None: all.
    """

    def __init__(self, last: int | None = None) -> None:
        self.last = last
        self.operations: list[str] = []

    def __call__(self, operation: str) -> None:
        if self.last is not None and len(self.operations) >= self.last:
            raise Died
        self.operations.append(operation)


class FullDisk(Power):
    """Has no space for certain operations, and for the others has it again.

    Args:
        first: The first operation without space.
        num: How many have none.
    """

    def __init__(self, first: int, num: int) -> None:
        super().__init__()
        self.without = range(first, first + num)

    def __call__(self, operation: str) -> None:
        super().__call__(operation)
        if len(self.operations) - 1 in self.without:
            raise OSError(errno.ENOSPC, "No space left on device")


Make = Callable[[Store, AuditLog], Any]


def synchronous(store: Store, audit: AuditLog) -> Coordinator:
    return Coordinator(settings(FedAvgM(momentum=0.5)), {}, rules(rounds=1), store, audit)


def begin(root: Path, power: Power, make: Make = synchronous) -> tuple[Any, Store]:
    store = Store(root, Disk(power))
    try:
        return make(store, AuditLog(root / "audit.jsonl")), store
    except BaseException:
        store.close()
        raise


def send(
    own: Coordinator, silo: str, round: int | None, topic: str, tensors: wire.Tree, fields: dict[str, Any], tmp: Path
) -> None:
    """What the server does for a PUT, and a silo that repeats it."""
    file = tmp / "upload"
    digest = wire.write(file, tensors, fields)
    upload = own.target(silo, round, topic, digest, file.stat().st_size)
    if upload.ok.exists():
        return
    upload.part.write_bytes(file.read_bytes())
    own.check(upload, topic)
    own.accept(upload, round, topic, 0.0)


def join_all(own: Coordinator, tmp: Path) -> None:
    """Joins every silo and sends the start, whatever has been done already."""
    tensors = {"params": {"x": torch.zeros(3)}, "buffers": {}, "rest": {}}
    manifest = wire.shapes_of(flatten(tensors))
    for silo in NAMES:
        own.join(silo, {"protocol": 1, "settings": {}, "common": {}, "manifest": manifest}, 0.0)
    if own.start is None:
        send(own, "east", None, START, flatten(tensors), {"common": {}}, tmp)


def drive(own: Coordinator, tmp: Path) -> None:
    """Does what silos and server do until the federation is over, whatever has been done already."""
    join_all(own, tmp)
    while own.machine.phase != "over":
        round = own.machine.round
        if own.machine.phase == "gathering":
            for silo in NAMES:
                own.next_round(silo, round - 1, 0.0)
            own.step(0.0)
        for silo, step in STEPS.items():
            update = flatten({"delta": {"x": torch.full((3,), step)}})
            report = RankReport(num_steps=1).to_message().fields
            send(own, silo, round, UPDATE, update, {"report": report, "weight": 1.0}, tmp)
        assert own.step(0.0)
        own.begin_close()
        own.close()


def outcome(root: Path) -> tuple[list[float], dict[str, object]]:
    own, store = begin(root, Power())
    assert own._model is not None
    model = own._model.state.server["params"]["x"].tolist()
    progress = own.progress
    store.close()
    return model, {"steps": progress.global_step, "history": progress.history}


def test_a_crash_before_any_operation_loses_nothing(tmp_path: Path) -> None:
    power = Power()
    own, store = begin(tmp_path / "whole", power)
    drive(own, tmp_path)
    store.close()
    expected = outcome(tmp_path / "whole")
    assert len(power.operations) > 25
    for last in range(len(power.operations)):
        root = tmp_path / f"crash{last}"
        store = None
        try:
            own, store = begin(root, Power(last))
            drive(own, tmp_path)
            raise AssertionError(f"there is no operation {last}")
        except Died:
            pass
        finally:
            if store is not None:
                store.close()
        own, store = begin(root, Power())
        drive(own, tmp_path)
        store.close()
        assert outcome(root) == expected, f"after a crash before operation {last}, {power.operations[last]!r}"
        verify(root / "audit.jsonl")


@pytest.mark.parametrize("num", [1, 3])
@pytest.mark.spread(1)
def test_a_disk_that_is_full_at_any_operation_changes_nothing(tmp_path: Path, num: int) -> None:
    """Disk full: nothing half done is kept, and the same process goes on once there is space."""
    power = Power()
    own, store = begin(tmp_path / "whole", power)
    drive(own, tmp_path)
    store.close()
    expected = outcome(tmp_path / "whole")
    for first in range(3, len(power.operations)):  # after the folders that are made at the start
        root = tmp_path / f"full{first}"
        own, store = begin(root, FullDisk(first, num))
        failures = 0
        while own.machine.phase != "over":
            try:
                drive(own, tmp_path)
            except OSError:
                failures += 1
                own.load(0.0)
        assert failures >= 1
        store.close()
        assert outcome(root) == expected, f"without space for operation {first}, {power.operations[first]!r}"
        verify(root / "audit.jsonl")
