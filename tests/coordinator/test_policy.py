"""A silo refuses what its own policy forbids, whatever the coordinator says, and writes it down."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import lightning_fl as fl
from lightning_fl.callbacks import SampleLevelDP
from lightning_fl.cli import main
from lightning_fl.coordinator.audit import verify
from lightning_fl.coordinator.policy import Policy, PolicyBroken, read_policy
from lightning_fl.coordinator.store import Store
from lightning_fl.privacy import ClientLevelDP
from lightning_fl.strategies.network import protections_of
from tests.helpers.network import LiveCoordinator, TinySilo, in_threads, live_coordinator, make_kits, rules, settings


@pytest.fixture
def live(tmp_path: Path) -> Iterator[LiveCoordinator]:
    make_kits(tmp_path)
    with live_coordinator(tmp_path, rules(), settings(), {"algorithm": "FedAvg(server_lr=1.0)"}) as own:
        yield own


def events(live: LiveCoordinator, silo: str) -> list[dict[str, Any]]:
    path = live.folder / silo / "state" / "audit.jsonl"
    verify(path)
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        ("algorithms: [FedProx]", "The algorithm is FedAvg; policy.yaml allows FedProx"),
        ("require: differential privacy", "requires differential privacy"),
        ("silos: [east, north]", "does not name the silos south"),
        (f"start: {'0' * 64}", "starts from the model"),
    ],
)
def test_a_federation_that_breaks_the_policy_is_not_joined(live: LiveCoordinator, policy: str, reason: str) -> None:
    (live.folder / "east" / "policy.yaml").write_text(policy)
    with pytest.raises(PolicyBroken, match=reason):
        TinySilo(live.folder, live.address, "east").join(live.expected)
    assert reason in events(live, "east")[-1]["reason"] or reason.split(";")[0] in events(live, "east")[-1]["reason"]


def test_one_update_too_many_is_refused(live: LiveCoordinator) -> None:
    (live.folder / "east" / "policy.yaml").write_text("max_rounds: 1\nalgorithms: [FedAvg]")
    silos = [TinySilo(live.folder, live.address, name).join(live.expected) for name in ("east", "north", "south")]
    east, north, south = silos
    assert in_threads(*(silo.round for silo in silos)) == [1.0] * 3

    def refuses() -> str:
        with pytest.raises(PolicyBroken) as caught:
            east.open()
        east.federation.leave(str(caught.value))
        return str(caught.value)

    assert "all that policy.yaml allows" in in_threads(refuses, north.round, south.round)[0]
    # Also after a restart, since what was sent is on the disk.
    again = TinySilo(live.folder, live.address, "east").join(live.expected)
    with pytest.raises(PolicyBroken, match=r"all that policy\.yaml allows"):
        again.open()
    again.federation.leave("it may not go on")


def test_updates_are_counted_by_the_silo_whatever_the_coordinator_says(
    live: LiveCoordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that denies that an update counts gets no more of them."""
    write = Store.write_outcome

    def deny(store: Store, folder: Path, tensors: Any, fields: dict[str, Any]) -> None:
        write(store, folder, tensors, {**fields, "accepted": {}} if "accepted" in fields else fields)

    monkeypatch.setattr(Store, "write_outcome", deny)
    for name in ("east", "north", "south"):
        (live.folder / name / "policy.yaml").write_text("max_rounds: 1")
    silos = [TinySilo(live.folder, live.address, name).join(live.expected) for name in ("east", "north", "south")]
    in_threads(*(silo.round for silo in silos))
    assert [silo.counted for silo in silos] == [0, 0, 0]
    for silo in silos:
        with pytest.raises(PolicyBroken, match="This silo has sent 1 update"):
            silo.open()


def test_a_round_that_may_close_with_too_few_silos_is_refused(tmp_path: Path) -> None:
    make_kits(tmp_path)
    (tmp_path / "east" / "policy.yaml").write_text("min_cohort: 3")
    (tmp_path / "south" / "policy.yaml").write_text("min_cohort: 2")
    with live_coordinator(tmp_path, rules(min_silos=2), settings()) as live:
        east, north, south = (TinySilo(tmp_path, live.address, name).join() for name in ("east", "north", "south"))

        def refuses() -> None:
            with pytest.raises(PolicyBroken, match=r"may close with 2 update\(s\)"):
                east.open()
            east.federation.leave("too few")

        in_threads(refuses, north.round, south.round)
    with pytest.raises(PolicyBroken, match="A round has 2 silos"):
        Policy(min_cohort=3).check_cohort(["north", "south"], 3)


def test_what_a_silo_has_sent_is_written_down(live: LiveCoordinator, capsys: pytest.CaptureFixture[str]) -> None:
    silos = [TinySilo(live.folder, live.address, name).join(live.expected) for name in ("east", "north", "south")]
    in_threads(*(silo.round for silo in silos))
    sent = [event for event in events(live, "east") if event["event"] == "sending"]
    assert [(event["round"], event["tensors"], event["weight"]) for event in sent] == [(0, ["delta x"], 1.0)]
    assert [event["round"] for event in events(live, "east") if event["event"] == "counted"] == [0]
    main(["network", "audit", "show", str(live.folder / "east" / "state" / "audit.jsonl")])
    assert "change of 1 tensors" in capsys.readouterr().out


def test_a_policy_with_a_mistake_is_no_policy(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    assert read_policy(path) == Policy()
    for text in ("algorithm: [FedAvg]", "min_cohort: 0", "max_rounds: yes", "silos: east", "require: luck", "[]"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"policy\.yaml"):
            read_policy(path)


@pytest.mark.parametrize(
    ("options", "is_private"),
    [
        ({"noise_multiplier": 1.0}, True),
        ({"noise_multiplier": 0.0}, False),
        ({"noise_multiplier": 1.0, "insecure_test_seed": 1}, False),
    ],
)
@pytest.mark.filterwarnings("ignore:insecure_test_seed")
def test_clipping_alone_is_no_differential_privacy(options: Any, is_private: bool) -> None:
    for transforms, callbacks in (
        ([ClientLevelDP(clip=1.0, **options)], []),
        ([], [SampleLevelDP(max_grad_norm=1.0, **options)]),
    ):
        strategy = fl.FederatedStrategy("fedavg", transforms=transforms)
        assert protections_of(strategy, callbacks) == (["differential privacy"] if is_private else [])
