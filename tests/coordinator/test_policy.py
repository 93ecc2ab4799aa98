"""A silo refuses what its own policy forbids, whatever the coordinator says, and writes it down."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lightning_fl.cli import main
from lightning_fl.coordinator.audit import verify
from lightning_fl.coordinator.policy import Policy, PolicyBroken, read_policy
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


def test_a_round_with_too_few_silos_or_one_too_many_is_refused(live: LiveCoordinator) -> None:
    (live.folder / "east" / "policy.yaml").write_text("min_cohort: 3\nmax_rounds: 1\nalgorithms: [FedAvg]")
    silos = [TinySilo(live.folder, live.address, name).join(live.expected) for name in ("east", "north", "south")]
    east, north, south = silos
    assert in_threads(*(silo.round for silo in silos)) == [1.0] * 3

    def refuses() -> str:
        with pytest.raises(PolicyBroken) as caught:
            east.open()
        east.federation.leave(str(caught.value))
        return str(caught.value)

    assert "all that policy.yaml allows" in in_threads(refuses, north.round, south.round)[0]
    # Also after a restart, since what counts is on the disk.
    again = TinySilo(live.folder, live.address, "east").join(live.expected)
    with pytest.raises(PolicyBroken, match=r"all that policy\.yaml allows"):
        again.open()
    again.federation.leave("it may not go on")
    (live.folder / "south" / "policy.yaml").write_text("min_cohort: 3")
    careful = TinySilo(live.folder, live.address, "south").join(live.expected)
    careful.done, north.done = 1, 1

    def refuses_few() -> None:
        with pytest.raises(PolicyBroken, match="A round has 2 silos"):
            careful.open()
        careful.federation.leave("too few")

    assert in_threads(refuses_few, north.round)[1] == 3.0


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
