"""Rounds that nobody waits for, over the coordinator: closed forms, restarts, and a replay of what was recorded."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import lightning_fl as fl
from lightning_fl import FederatedStrategy
from lightning_fl.coordinator.audit import verify
from lightning_fl.coordinator.buffered_machine import BufferedMachine
from lightning_fl.coordinator.buffered_service import BufferedCoordinator
from lightning_fl.coordinator.client import CallRefused
from lightning_fl.coordinator.export import read_model
from lightning_fl.coordinator.machine import GRACE, Rules
from lightning_fl.coordinator.policy import PolicyBroken
from lightning_fl.coordinator.service import UPDATE
from lightning_fl.coordinator.store import Store
from lightning_fl.federation import RankReport
from lightning_fl.schedules import Buffered, FedAsync, Polynomial, Recorded
from lightning_fl.strategies.network import settings_of_silo
from lightning_fl.tree import flatten
from tests.coordinator import test_crash
from tests.coordinator.test_crash import Power, join_all, send
from tests.coordinator.test_training import loader_of, validation_of
from tests.helpers.network import (
    NAMES,
    Died,
    LiveCoordinator,
    TinySilo,
    in_threads,
    live_coordinator,
    make_kits,
    rules,
    settings,
    without_launcher,
)
from tests.helpers.training import Ordinary, trainer, weights

STEPS = {"east": 1.0, "north": 2.0, "south": 6.0}
ROOT = 2**-0.5
"""The weight of an update that is one version old."""


# ---- the machine


def machine(size: int = 2, max_staleness: int | None = None, **options: Any) -> BufferedMachine:
    times = {"gather_s": 10.0, "deadline_s": 100.0, "max_deadline_s": 300.0}
    own_rules = Rules(**{"silos": ("a", "b", "c"), "rounds": 3, **times, **options})
    own = BufferedMachine(own_rules, size=size, max_staleness=max_staleness)
    for silo in own_rules.silos:
        own.ask(silo, 0.0)
    own.open(0.0)
    for silo in own_rules.silos:
        assert own.ask(silo, 0.0)
    return own


def close(own: BufferedMachine, now: float = 0.0) -> None:
    assert own.due(now) == "close"
    own.begin_close()
    assert own.is_busy
    own.closed()
    if own.phase != "over":
        assert own.due(now) == "open"
        own.open(now)


def test_a_round_closes_with_its_size_and_the_others_train_on() -> None:
    own = machine()
    own.accept("a", "1")
    assert own.due(99.0) is None
    assert not own.ask("a", 1.0)  # it waits for a model that holds its update
    own.accept("b", "2")
    assert own.is_busy  # a third would belong to the next round
    close(own)
    assert own.takes("c", 0)
    assert not own.takes("a", 0)
    assert not own.ask("c", 1.0) or own.versions["c"] == 1
    assert own.ask("a", 1.0)
    assert own.versions["a"] == 1


def test_with_too_few_a_round_closes_at_its_deadline() -> None:
    own = machine(size=3, min_silos=2)
    own.accept("a", "1")
    assert own.due(100.0) is None
    own.accept("b", "2")
    assert (own.due(99.0), own.due(100.0)) == (None, "close")
    close(own, 100.0)
    # Nobody waits again for the one that is away, but it may still come.
    for silo in ("a", "b"):
        own.ask(silo, 101.0)
        own.accept(silo, "3")
    assert own.due(101.0) == "close"
    assert own.takes("c", 0)


def test_it_does_not_wait_for_those_that_have_left() -> None:
    own = machine(size=3)
    for silo in ("a", "b"):
        own.accept(silo, silo)
    own.leave("a")
    own.leave("c")
    assert own.due(1.0) == "close"
    close(own)
    assert own.versions == {}


def test_a_transfer_outlasts_the_round_in_which_it_has_begun() -> None:
    own = machine(max_staleness=1)
    for silo in ("a", "b"):
        own.accept(silo, silo)
    own.progress("c", 90.0)
    close(own, 90.0)
    assert own.sending == {"c": 90.0}
    assert own.closes_at == max(90.0 + 100.0, 90.0 + GRACE)
    assert not own.is_too_stale("c")
    own.ask("a", 90.0)
    own.ask("b", 90.0)
    own.accept("a", "3")
    own.accept("b", "4")
    close(own, 90.0)
    assert own.is_too_stale("c")
    own.drop("c")
    assert (own.takes("c", 0), own.too_stale) == (False, ["c"])


# ---- the coordinator


def coordinator(folder: Path, schedule: Any, **options: Any) -> Any:
    return live_coordinator(folder, rules(**options), replace(settings(), schedule=schedule))


@pytest.fixture
def live(folder: Path) -> Iterator[LiveCoordinator]:
    with coordinator(folder, Buffered(2, staleness=Polynomial(0.5), max_staleness=1), rounds=5) as own:
        yield own


def silo(live: LiveCoordinator, name: str) -> TinySilo:
    return TinySilo(live.folder, live.address, name, STEPS[name], is_asynchronous=True).join()


def silos_of(live: LiveCoordinator) -> list[TinySilo]:
    return [silo(live, name) for name in NAMES]


def history(live: LiveCoordinator) -> list[dict[str, Any]]:
    return live.coordinator.progress.history


def test_stale_updates_are_weighed_and_those_that_are_too_old_counted(live: LiveCoordinator) -> None:
    east, north, south = silos_of(live)
    first = in_threads(east.open, north.open, south.open)
    assert in_threads(lambda: east.send(first[0]), lambda: north.send(first[1])) == [1.5] * 2
    # South is one version old: it counts with the root of a half, in the round of the next one that comes.
    second = 1.5 + (1 + 6 * ROOT) / 2
    assert in_threads(east.round, lambda: south.send(first[2])) == [pytest.approx(second)] * 2
    # Two versions old is too old: nobody waits, nothing of it counts, and it has the newest model.
    stale = south.open()
    for _ in range(2):
        in_threads(east.round, north.round)
    assert south.send(stale) == pytest.approx(second + 3.0)
    assert (south.counted, east.counted) == (1, 4)
    assert live.events("too stale")[0]["version"] == 2
    in_threads(lambda: south.round(), east.round)
    told = [(entry["versions"], entry["staleness"], entry["too_stale"]) for entry in history(live)]
    assert told == [
        ({"east": 0, "north": 0}, [2], []),
        ({"east": 1, "south": 0}, [1, 1], []),
        ({"east": 2, "north": 2}, [2], []),
        ({"east": 3, "north": 3}, [2], []),
        ({"east": 4, "south": 4}, [2], ["south"]),
    ]


def test_fedasync_mixes_each_model_into_the_present_one(folder: Path) -> None:
    with coordinator(folder, FedAsync(0.5, Polynomial(1.0))) as live:
        east, north, south = silos_of(live)
        first = in_threads(east.open, north.open, south.open)
        one = 0.5 * 1.0
        assert east.send(first[0]) == pytest.approx(one)
        two = (1 - 0.25) * one + 0.25 * 2.0  # its model is 0 + 2, one version old
        assert north.send(first[1]) == pytest.approx(two)
        three = (1 - 0.5 / 3) * two + 0.5 / 3 * 6.0
        assert south.send(first[2]) == pytest.approx(three)


@pytest.mark.parametrize("who", ["silo", "coordinator", "both"])
def test_what_was_accepted_counts_once_whoever_dies(live: LiveCoordinator, who: str) -> None:
    east, north, south = silos_of(live)
    first = in_threads(east.open, north.open, south.open)
    in_threads(lambda: east.send(first[0]), lambda: north.send(first[1]))
    south.die_after_sending(first[2])  # one version old, in the buffer of a round that is open
    if who in ("coordinator", "both"):
        live.restart()
    if who in ("silo", "both"):
        south = silo(live, "south")
        assert south.counted == 0  # not yet, but it will
        model, opening = in_threads(east.round, south.open)
        assert (opening.round, south.counted) == (2, 1)
    else:
        model = east.round()
    assert model == pytest.approx(1.5 + (1 + 6 * ROOT) / 2)
    assert history(live)[1]["versions"] == {"east": 1, "south": 0}
    assert silo(live, "south").counted == 1
    verify(live.folder / "federation" / "audit.jsonl")


def test_a_call_that_is_repeated_after_its_round_was_closed_counts_once(live: LiveCoordinator) -> None:
    east, north, south = silos_of(live)
    first = in_threads(east.open, north.open, south.open)
    in_threads(lambda: east.send(first[0]), lambda: north.send(first[1]))
    with pytest.raises(CallRefused) as caught:
        east.federation.client.upload("/v1/rounds/0/update", east.federation.folder.update)
    assert caught.value.status == 410
    assert [entry["members"] for entry in history(live)] == [["east", "north"]]


def test_a_transfer_goes_on_where_it_was_when_rounds_close_meanwhile(live: LiveCoordinator) -> None:
    east, north, south = silos_of(live)
    first = in_threads(east.open, north.open, south.open)
    own, content = live.coordinator, b"x" * 100
    upload = own.target("south", 0, UPDATE, "0" * 64, 1000)
    upload.part.write_bytes(content)
    in_threads(lambda: east.send(first[0]), lambda: north.send(first[1]))
    assert own.target("south", 0, UPDATE, "0" * 64, 1000).size == len(content)


def test_the_model_from_which_a_silo_trains_is_kept_for_it_and_no_longer(folder: Path) -> None:
    with coordinator(folder, Buffered(2), rounds=9) as live:
        east, north, south = silos_of(live)
        first = in_threads(east.open, north.open, south.open)
        in_threads(lambda: east.send(first[0]), lambda: north.send(first[1]))
        for _ in range(3):
            in_threads(east.round, north.round)
        digest = south.federation._opening["state"]
        south.federation.client.download(f"/v1/states/{digest}", south.federation.folder.model, digest)
        in_threads(east.round, lambda: south.send(first[2]))
        in_threads(east.round, north.round)
        assert len(list((folder / "federation" / "states").iterdir())) <= 6
        with pytest.raises(CallRefused):
            south.federation.client.download(f"/v1/states/{digest}", south.federation.folder.model, digest)


def test_a_silo_whose_model_has_become_too_old_while_it_loads_takes_a_newer_one(folder: Path) -> None:
    with coordinator(folder, Buffered(2, max_staleness=0), rounds=9) as live:
        east, north, south = silos_of(live)
        first = in_threads(east.open, north.open, south.open)
        in_threads(lambda: east.send(first[0]), lambda: north.send(first[1]))
        south = silo(live, "south")  # its process has died, and comes back
        download, tries = south.federation.client.download, []

        def slowly(path: str, file: Path, digest: str) -> None:
            tries.append(digest)
            if len(tries) == 1:
                for _ in range(3):
                    in_threads(east.round, north.round)
            download(path, file, digest)

        south.federation.client.download = slowly  # type: ignore[method-assign]
        assert south.open().round == 4
        assert len(tries) == 2


def test_the_policy_counts_the_updates_with_which_a_round_closes_at_least(folder: Path) -> None:
    (folder / "east" / "policy.yaml").write_text("min_cohort: 2\n")
    with coordinator(folder, Buffered(2)) as live:
        east, north, south = silos_of(live)

        def refused() -> None:
            with pytest.raises(PolicyBroken, match=r"may close with 1 update\(s\)"):
                east.open()

        in_threads(refused, north.open, south.open)


@pytest.mark.parametrize(("size", "min_silos"), [(4, 1), (2, 3)])
def test_a_size_that_rounds_do_not_reach_is_refused(tmp_path: Path, size: int, min_silos: int) -> None:
    with pytest.raises(ValueError, match="min_silos <= size <= number of silos"):
        begin(tmp_path / "federation", Power(), Buffered(size), min_silos=min_silos)


# ---- a crash before any operation


def begin(root: Path, power: Power, schedule: Any, **options: Any) -> tuple[BufferedCoordinator, Store]:
    own = replace(settings(), schedule=schedule)
    return test_crash.begin(
        root, power, lambda store, audit: BufferedCoordinator(own, {}, rules(**options), store, audit)
    )


def drive(own: BufferedCoordinator, tmp: Path) -> None:
    """East and north make the first round, east and the stale south the second, whatever has been done already."""
    join_all(own, tmp)
    while own.machine.phase != "over":
        round = own.machine.round
        if own.machine.phase == "gathering":
            for name in NAMES:
                own.next_round(name, round - 1, 0.0)
            own.step(0.0)
        members = {"east": round, **({"north": 0} if round == 0 else {"south": 0})}
        for name, version in members.items():
            if round == 0 or name == "east":
                own.next_round(name, -1, 0.0)
            if round == 0:
                own.next_round("south", -1, 0.0)
            assert own.machine.versions[name] == version
            update = flatten({"delta": {"x": torch.full((3,), STEPS[name])}})
            report = RankReport(num_steps=1).to_message().fields
            send(own, name, version, UPDATE, update, {"report": report, "weight": 1.0}, tmp)
        assert own.step(0.0)
        own.begin_close()
        own.close()


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_a_crash_before_any_operation_loses_and_repeats_nothing(tmp_path: Path, every: int) -> None:
    schedule = Buffered(2, staleness=Polynomial(0.5))

    def outcome(root: Path) -> Any:
        own, store = begin(root, Power(), schedule, rounds=2)
        store.close()
        assert own._model is not None
        return own._model.state.server["params"]["x"].tolist(), own.progress.history

    power = Power()
    own, store = begin(tmp_path / "whole", power, schedule, rounds=2)
    drive(own, tmp_path)
    store.close()
    expected = outcome(tmp_path / "whole")
    assert expected[0] == [pytest.approx(1.5 + (1 + 6 * ROOT) / 2)] * 3
    for last in range(0, len(power.operations), every):
        root, store = tmp_path / f"crash{last}", None
        try:
            own, store = begin(root, Power(last), schedule, rounds=2)
            drive(own, tmp_path)
            raise AssertionError(f"there is no operation {last}")
        except Died:
            pass
        finally:
            if store is not None:
                store.close()
        own, store = begin(root, Power(), schedule, rounds=2)
        drive(own, tmp_path)
        store.close()
        assert outcome(root) == expected, f"after a crash before operation {last}, {power.operations[last]!r}"
        verify(root / "audit.jsonl")


# ---- training


class Constant(Ordinary):
    """Dropout, BatchNorm and shuffled batches, with a learning rate that stays."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Slowly(fl.callbacks.FederatedCallback):
    """Trains as long as a machine of its kind."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_client_end(self, trainer: Any, module: Any, client: Any, run: Any, update: Any) -> None:
        threading.Event().wait(self.seconds)


SCHEDULES = {
    "fedbuff": Buffered(2, staleness=Polynomial(0.5), max_staleness=4),
    "fedasync": FedAsync(0.6, Polynomial(0.5)),
}


def train_silo(address: str, folder: Path, case: str, options: dict[str, Any]) -> Any:
    without_launcher()
    number = int(Path.cwd().name.removeprefix("rank"))
    name = NAMES[number]
    module = Constant(torch.float64)
    schedule = SCHEDULES[case]
    strategy = FederatedStrategy(federation=address, kit=folder / name, schedule=schedule, **options)
    fit = trainer(strategy, max_epochs=5, limit_val_batches=0, callbacks=[Slowly(0.2 * number)])
    fit.fit(module, loader_of(name), validation_of(name))
    return weights(module), strategy.history


@pytest.mark.parametrize(
    ("case", "options"),
    [
        ("fedbuff", {"algorithm": "fedavg"}),
        pytest.param("fedasync", {"algorithm": "fedavg"}, marks=pytest.mark.slow),
        pytest.param("fedbuff", {"algorithm": "scaffold", "personal": ["net.4.*"]}, marks=pytest.mark.slow),
    ],
)
def test_a_replay_of_what_was_recorded_gives_the_model_of_the_silos(
    run_ranks: Any, tmp_path: Path, case: str, options: dict[str, Any]
) -> None:
    make_kits(tmp_path)
    strategy = FederatedStrategy(federation="https://localhost", kit="kit", schedule=SCHEDULES[case], **options)
    own = replace(settings(strategy.algorithm), schedule=strategy.schedule)
    with live_coordinator(tmp_path, rules(rounds=5), own, settings_of_silo(strategy)) as live:
        silos = run_ranks(3, train_silo, live.address, tmp_path, case, options)
    recorded = Recorded(str(tmp_path / "federation"), SCHEDULES[case])
    ages = [visit.version - index for index, visits in enumerate(recorded.rounds) for visit in visits]
    assert min(ages) < 0  # there were stale updates
    clients = fl.datamodules.ClientLoaders({name: loader_of(name) for name in NAMES})
    replayed = Constant(torch.float64)
    strategy = FederatedStrategy(schedule=recorded, engine="sequential", **options)
    trainer(strategy, max_epochs=5, limit_val_batches=0).fit(replayed, clients, validation_of(*NAMES))
    expected, _ = read_model(tmp_path / "federation")
    personal = options.get("personal", [])
    shared = {name: value for name, value in replayed.state_dict().items() if not (personal and "net.4" in name)}
    for name, value in shared.items():
        torch.testing.assert_close(expected[name], value, rtol=1e-9, atol=1e-9)
    assert personal or all(torch.equal(own, silos[0][0]) for own, _ in silos)
    assert all({"staleness", "versions", "too_stale"} <= entry.keys() for _, own in silos for entry in own)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"schedule": Buffered(2, concurrency=2)}, "concurrency"),
        ({"schedule": Buffered(2), "durations": {0: 1.0}}, "durations"),
        ({"schedule": fl.schedules.Deadline(10)}, "simulated clock"),
        ({"schedule": Buffered(2), "transforms": [fl.compression.LowRank(1)]}, "weighs each update by its age"),
        ({"schedule": Buffered(2), "aggregator": fl.privacy.SecureAggregation("bonawitz")}, "different versions"),
    ],
)
def test_what_does_not_go_with_it_is_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        FederatedStrategy("fedavg", federation="https://localhost", kit="kit", **options)
