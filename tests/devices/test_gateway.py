"""What the gateway takes in, refuses and counts, without sockets; the time is passed in."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

from lightning_fl.aggregation.robust import FLTrust, Median, MultiKrum
from lightning_fl.algorithms import FedAdam, FedAvgM, Scaffold
from lightning_fl.coordinator import wire
from lightning_fl.coordinator.audit import verify
from lightning_fl.coordinator.disk import Disk
from lightning_fl.coordinator.export import read_model
from lightning_fl.coordinator.refused import Refused
from lightning_fl.devices.admission import AdmissionRules
from lightning_fl.devices.registry import Registry
from lightning_fl.schedules import Buffered, Deadline, FedAsync, Polynomial
from lightning_fl.tree import flatten
from tests.helpers.devices import NAMES, Clock, check_in, gateway, model, send
from tests.helpers.network import Died


def refused(kind: str, call: Any, *args: Any, **options: Any) -> None:
    with pytest.raises(Refused) as found:
        call(*args, **options)
    assert found.value.facts["kind"] == kind


def test_an_update_weighs_by_its_age(tmp_path: Path) -> None:
    own = gateway(tmp_path, Buffered(1, staleness=Polynomial(0.5)))
    tasks = {name: check_in(own, name) for name in NAMES}
    assert all(task is not None and task["version"] == 0 for task in tasks.values())
    moves = []
    for name in NAMES:
        before = model(own)[0]
        send(own, name, tasks[name] or {}, 1.0)
        moves.append(model(own)[0] - before)
    assert moves == pytest.approx([1.0, 0.70710678, 0.57735027], abs=1e-6)
    assert [entry["staleness"] for entry in own.progress.history] == [[1], [0, 1], [0, 0, 1]]


def test_a_round_is_the_mean_by_examples(tmp_path: Path) -> None:
    own = gateway(tmp_path, Buffered(3))
    for name, delta, examples in (("a", 1.0, 1), ("b", 2.0, 2), ("c", 6.0, 5)):
        assert model(own) == [0.0] * 3  # nothing moves before the round is full
        send(own, name, check_in(own, name) or {}, delta, num_examples=examples)
    assert model(own) == pytest.approx([35 / 8] * 3)
    entry = own.progress.history[0]
    assert (entry["members"], entry["num_examples"], own.round) == (["a", "b", "c"], 8, 1)
    assert read_model(own.store.root)[0]["x"].tolist() == model(own)


def test_fedasync_mixes_whole_models(tmp_path: Path) -> None:
    own = gateway(tmp_path, FedAsync(alpha=0.5, max_staleness=5), weighting="uniform")
    first, second = check_in(own, "a") or {}, check_in(own, "b") or {}
    send(own, "a", first, 4.0)
    assert model(own) == [2.0] * 3
    send(own, "b", second, 4.0)  # its model is 4, whatever has come meanwhile: 2 + (4 - 2) / 2
    assert model(own) == [3.0] * 3


@pytest.mark.parametrize(("algorithm", "moves"), [(FedAvgM(momentum=0.5), [1.0, 2.5]), (FedAdam(), None)])
def test_state_of_the_server_outlives_a_restart(tmp_path: Path, algorithm: Any, moves: Any) -> None:
    models = []
    for restarts in (False, True):
        (folder := tmp_path / str(restarts)).mkdir()
        own = gateway(folder, Buffered(1), algorithm=algorithm)
        for _ in range(2):
            send(own, "a", check_in(own, "a") or {}, 1.0)
            models.append(model(own))
            if restarts:
                own.store.close()
                own = gateway(folder, Buffered(1), algorithm=algorithm)
    assert models[:2] == models[2:]
    if moves:
        assert [found[0] for found in models[:2]] == moves


def test_robust_rules_work_as_ever(tmp_path: Path) -> None:
    own = gateway(tmp_path, Buffered(3), aggregator=Median(), weighting="uniform")
    for name, delta in (("a", 1.0), ("b", 2.0), ("c", 1e6)):
        send(own, name, check_in(own, name) or {}, delta)
    assert model(own) == [2.0] * 3


def test_a_round_that_cant_be_closed_ends_the_federation_with_the_reason(tmp_path: Path) -> None:
    own = gateway(tmp_path, Buffered(2), aggregator=FLTrust("c"), weighting="uniform")
    for name in ("a", "b"):
        send(own, name, check_in(own, name) or {}, 1.0)
    assert "root" in (own.over or "")
    refused("over", check_in, own, "c")
    own.store.close()
    own = gateway(tmp_path, Buffered(2), aggregator=FLTrust("c"), weighting="uniform")
    assert own.is_over
    assert model(own) == [0.0] * 3
    own.store.close()
    own = gateway(tmp_path, Buffered(2), aggregator=Median(), weighting="uniform")  # the operator has changed the rule
    assert (own.is_over, own.round, model(own)) == (False, 1, [1.0] * 3)


def test_a_round_whose_sum_overflows_is_dropped_and_the_federation_goes_on(tmp_path: Path) -> None:
    own = gateway(tmp_path, Buffered(2), rules=AdmissionRules(max_norm=float("inf")))
    send(own, "a", check_in(own, "a") or {}, 3e38, num_examples=10_000)
    send(own, "b", check_in(own, "b") or {}, 1.0)
    assert (own.is_over, own.round, own.arrived, model(own)) == (False, 0, {}, [0.0] * 3)
    assert "dropped" in (own.store.root / "audit.jsonl").read_text()
    for name in ("b", "c"):  # none of it counts as taken
        send(own, name, check_in(own, name) or {}, 2.0)
    assert (own.round, model(own)) == (1, [2.0] * 3)


def test_updates_that_newer_rules_refuse_are_dropped_and_the_federation_goes_on(tmp_path: Path) -> None:
    own = gateway(tmp_path, Buffered(2))
    send(own, "a", check_in(own, "a") or {}, 100.0, num_examples=500)
    folder = own.store.folder(0, "update")
    for name, content in (("b", b"damaged"), ("c", None)):  # c: from before versions had to be whole numbers
        path = folder / f"{name}.{'0' * 64}.ok"
        said = {"version": 0.0, "num_examples": 1, "num_steps": 1, "loss": 0.5}
        wire.write(path, flatten({"delta": {"x": torch.ones(3)}}), said)
        path.write_bytes(content or path.read_bytes())
    own.store.close()
    own = gateway(tmp_path, Buffered(2), rules=AdmissionRules(max_examples=100))
    assert (own.is_over, own.round, own.arrived, list(folder.glob("*.ok"))) == (False, 0, {}, [])
    for name in ("b", "c"):
        send(own, name, check_in(own, name) or {}, 2.0)
    assert (own.round, model(own)) == (1, [2.0] * 3)


# ---- what is refused


def test_what_a_device_sends_is_checked(tmp_path: Path) -> None:
    own = gateway(tmp_path, Buffered(3))
    task = check_in(own, "a") or {}
    nan = torch.tensor([0.0, float("nan"), 0.0])
    refused("not finite", send, own, "a", task, nan)
    refused("not finite", send, own, "a", task, 1.0, loss=float("nan"))
    refused("malformed", send, own, "a", task, torch.zeros(4))
    refused("malformed", send, own, "a", task, torch.zeros(3, dtype=torch.float64))
    for fields in ({"num_examples": 10_001}, {"num_examples": 0}, {"num_examples": True}, {"num_steps": -1}):
        refused("malformed", send, own, "a", task, 1.0, **fields)
    for version in (7, 0.0, False):  # the last two equal 0, but index nothing
        refused("malformed", send, own, "a", task, 1.0, version=version)
    for loss in (10**400, 1.7e308, True, "1", None):
        refused("not finite", send, own, "a", task, 1.0, loss=loss)
    refused("malformed", send, own, "a", task, 3e38)  # finite, but 10,000 times that is not
    own.arriving("a").write_bytes(b"\x80\x04no tensors")
    refused("malformed", own.receive, "a", task["task"], own.arriving("a"))
    assert own.arrived == {}
    send(own, "a", task, 1.0)  # none of it has used the task up
    assert list(own.arrived) == ["a"]


def test_a_task_counts_once_and_for_its_device(tmp_path: Path) -> None:
    clock = Clock()
    own = gateway(tmp_path, Buffered(2), clock=clock, rules=AdmissionRules(task_s=60))
    first, other = check_in(own, "a") or {}, check_in(own, "c") or {}
    refused("task", send, own, "b", first, 1.0)
    refused("task", send, own, "a", {**first, "task": first["task"].replace("0.", "1.", 1)}, 1.0)
    for invented in ("0", "0.1.\udcff", "0.1.\ud800", "²", "²".join("000")):
        refused("task", send, own, "a", {**first, "task": invented}, 1.0)
    send(own, "a", first, 1.0)
    refused("replay", send, own, "a", first, 1.0)
    refused("replay", send, own, "a", first, 2.0)
    assert check_in(own, "a") is None  # until there is a model that holds its update
    send(own, "b", check_in(own, "b") or {}, 3.0)
    assert model(own) == [2.0] * 3
    refused("replay", send, own, "a", first, 1.0)  # also after the round
    assert own.progress.history[0]["members"] == ["a", "b"]
    clock.now += 61
    refused("late", send, own, "c", other, 1.0)


def test_updates_that_are_too_old(tmp_path: Path) -> None:
    own = gateway(tmp_path, Buffered(1, max_staleness=1))
    old = check_in(own, "c") or {}
    for _ in range(2):
        send(own, "a", check_in(own, "a") or {}, 1.0)
    refused("stale", send, own, "c", old, 100.0)
    assert model(own) == [2.0] * 3
    send(own, "c", check_in(own, "c") or {}, 1.0)


def test_who_may_train(tmp_path: Path) -> None:
    clock = Clock()
    rules = AdmissionRules(("charging", "unmetered"), updates_per_day=2, requests_per_minute=3)
    own = gateway(tmp_path, Buffered(1, concurrency=2), rules=rules, clock=clock)
    refused("condition", check_in, own, "a", ["charging"])
    both = ["unmetered", "charging"]
    for _ in range(2):
        send(own, "a", check_in(own, "a", both) or {}, 1.0)
    refused("quota", check_in, own, "a", both)
    own.store.close()
    own = gateway(tmp_path, Buffered(1, concurrency=2), rules=rules, clock=clock)
    refused("quota", check_in, own, "a", both)  # a restart forgets no quota
    clock.now += 86_400
    task = check_in(own, "a", both) or {}
    assert check_in(own, "b", both) is not None
    assert check_in(own, "c", both) is None  # two train
    send(own, "a", task, 1.0)
    assert check_in(own, "c", both) is not None
    token = (tmp_path / "b.token").read_text()
    assert [own.who(f"Bearer {token}", now) for now in (0.0, 1.0, 2.0)] == ["b"] * 3
    refused("quota", own.who, f"Bearer {token}", 3.0)
    assert own.who(f"Bearer {token}", 61.0) == "b"


def test_tasks_that_were_kept_do_not_get_around_the_quota(tmp_path: Path) -> None:
    own = gateway(tmp_path, Buffered(1), rules=AdmissionRules(updates_per_day=1))
    kept = []
    for other in ("b", "c"):
        kept.append(check_in(own, "a") or {})
        send(own, other, check_in(own, other) or {}, 0.0)
    send(own, "a", kept[0], 1.0)
    with pytest.raises(Refused, match="1 updates") as found:
        send(own, "a", kept[1], 1.0)
    assert (found.value.status, found.value.facts["retry_after"]) == (429, 86_400)


def test_a_revoked_device_is_out_at_once(tmp_path: Path) -> None:
    own = gateway(tmp_path, Buffered(2), names=("a", "b", "c", "d"))
    tasks = {name: check_in(own, name) or {} for name in "abcd"}
    send(own, "a", tasks["a"], 100.0)
    for name in ("a", "b"):
        own.registry.revoke(name)
    refused("token", send, own, "b", tasks["b"], 100.0)
    refused("token", check_in, own, "b")  # also where it was held while it was known
    for name in ("c", "d"):
        assert own.round == 0
        send(own, name, tasks[name], 1.0)
    assert (own.progress.history[0]["members"], model(own)) == (["c", "d"], [1.0] * 3)


def test_devices_that_are_enrolled_at_the_same_time(tmp_path: Path) -> None:
    def enrol(start: int) -> None:
        for index in range(8):
            Registry(tmp_path / "devices.json").enrol(f"d{start + index}")

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(enrol, (0, 8, 16)))
    assert len(Registry(tmp_path / "devices.json").names) == 24


def test_tokens(tmp_path: Path) -> None:
    own = gateway(tmp_path, Buffered(1))
    token = (tmp_path / "a.token").read_text()
    for wrong in ("", "a", "a.", token[:-1], token.replace("a.", "b.", 1), "é.ü", "a.\udcff", "\ud800.\ud800"):
        refused("token", own.who, f"Bearer {wrong}", 0.0)
    assert token.partition(".")[2] not in (tmp_path / "devices.json").read_text()
    own.registry.revoke("a")
    refused("token", own.who, f"Bearer {token}", 0.0)
    with pytest.raises(ValueError, match="no device 'a'"):
        own.registry.revoke("a")
    with pytest.raises(ValueError, match="can't be called"):
        own.registry.enrol("../a")


def test_refusals_are_counted_and_do_not_fill_the_log(tmp_path: Path) -> None:
    own = gateway(tmp_path, Buffered(1))
    for _ in range(50):
        own.refuse("a", Refused(422, "NaN", kind="not finite"))
        own.refuse(None, Refused(401, "No device has this token.", kind="token"))
    assert own.status()["refused"] == {"not finite": 50, "token": 50}
    lines = [json.loads(line) for line in (own.store.root / "audit.jsonl").read_text().splitlines()]
    assert sum(line["event"] == "refused" for line in lines) == 2


def test_the_federation_ends(tmp_path: Path) -> None:
    own = gateway(tmp_path, Buffered(1), rounds=2)
    late = check_in(own, "b") or {}
    for _ in range(2):
        send(own, "a", check_in(own, "a") or {}, 1.0)
    refused("over", check_in, own, "a")
    refused("over", send, own, "b", late, 1.0)
    assert verify(own.store.root / "audit.jsonl")[0] > 2


@pytest.mark.parametrize(
    ("message", "schedule", "options"),
    [
        ("can't wait for single devices", None, {}),
        ("can't wait for single devices", Deadline(1.0), {}),
        ("Set max_staleness", FedAsync(), {}),
        ("Clients of Scaffold do more than training steps", Buffered(2), {"algorithm": Scaffold()}),
        ("needs the module", Buffered(2), {"aggregator": FLTrust(TensorDataset(torch.zeros(1)))}),
        ("MultiKrum", Buffered(2), {"aggregator": MultiKrum(num_attackers=1)}),
    ],
)
def test_what_devices_cant_do(tmp_path: Path, message: str, schedule: Any, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=message):
        gateway(tmp_path, schedule, **options)


# ---- the process dies


class Power:
    """Goes out before a certain operation."""

    def __init__(self, last: int | None) -> None:
        self.last, self.operations = last, 0

    def __call__(self, operation: str) -> None:
        if self.last is not None and self.operations >= self.last:
            raise Died
        self.operations += 1


def drive(folder: Path, last: int | None, updates: dict[tuple[str, int], dict[str, Any]]) -> int:
    """Runs a federation of two rounds until the power goes out; returns the number of file operations.

    Devices outlive the gateway: they keep their tasks, and send again what they have had no answer to.
    """
    power = Power(last)
    own = gateway(folder, Buffered(2), algorithm=FedAvgM(momentum=0.5), rounds=2, disk=Disk(power), names=("a", "b"))
    try:
        while not own.is_over:
            version = own.round
            for name, delta in (("b", 3.0), ("a", 1.0)):
                key = name, version
                if key not in updates:
                    updates[key] = check_in(own, name) or {}
                try:
                    send(own, name, updates[key], delta * (version + 1))
                except Refused as error:
                    if error.facts["kind"] != "replay":  # the answer to an earlier call was lost
                        raise
        return power.operations
    finally:
        own.store.close()


def outcome(folder: Path) -> tuple[list[float], list[Any]]:
    own = gateway(folder, Buffered(2), algorithm=FedAvgM(momentum=0.5), rounds=2, names=("a", "b"))
    try:
        return model(own), [(entry["members"], entry["versions"]) for entry in own.progress.history]
    finally:
        own.store.close()


def test_the_commit_does_not_grow_with_the_rounds_and_the_log_has_all(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("lightning_fl.devices.gateway.KEPT_ROUNDS", 2)
    own = gateway(tmp_path, Buffered(1))
    log = own.store.root / "audit.jsonl"
    for _ in range(4):
        send(own, "a", check_in(own, "a") or {}, 1.0)

    def lines() -> list[dict[str, Any]]:
        return [line for line in map(json.loads, log.read_text().splitlines()) if line["event"] == "round closed"]

    assert [entry["round"] for entry in own.progress.history] == [2, 3]
    before = lines()
    assert [(line["round"], line["figures"]["train_loss"]) for line in before] == [(n, 0.5) for n in range(4)]
    own.store.close()
    log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:-1]))  # it died before the last line
    for _ in range(2):  # the second start has nothing to add
        gateway(tmp_path, Buffered(1)).store.close()
        assert [{**line, "time": 0, "previous": 0} for line in lines()] == [
            {**line, "time": 0, "previous": 0} for line in before
        ]
    verify(log)


@pytest.mark.parametrize("every", [11, pytest.param(1, marks=pytest.mark.slow)])
def test_a_death_before_any_operation_loses_nothing_and_counts_nothing_twice(tmp_path: Path, every: int) -> None:
    (whole := tmp_path / "whole").mkdir()
    operations = drive(whole, None, {})
    expected = outcome(whole)
    assert expected[0] == [2 + (1 + 4)] * 3
    assert operations > 30
    for last in range(0, operations, every):
        (folder := tmp_path / str(last)).mkdir()
        updates: dict[tuple[str, int], dict[str, Any]] = {}
        with pytest.raises(Died):
            drive(folder, last, updates)
        drive(folder, None, updates)
        assert outcome(folder) == expected, last
        verify(folder / "federation" / "audit.jsonl")


def test_the_last_update_is_not_lost_between_its_arrival_and_the_end_of_its_round(tmp_path: Path) -> None:
    own = gateway(tmp_path, Buffered(2))
    send(own, "a", check_in(own, "a") or {}, 1.0)
    task = check_in(own, "b") or {}
    own.schedule = Buffered(3)  # what is written is that of a gateway that dies before it closes the round
    send(own, "b", task, 3.0)
    own.store.close()
    own = gateway(tmp_path, Buffered(2))
    assert (own.round, model(own)) == (1, [2.0] * 3)
    assert wire.shapes_of(own.model.state.server["params"]) == {"x": ("F32", (3,))}
