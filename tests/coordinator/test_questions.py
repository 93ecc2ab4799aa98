"""Silos meet at the coordinator, ask each other questions, and learn what one file of all rows would say."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from lightning_fl.analytics import By, Frequency, KaplanMeier, Quantile, Variance, analyze, federated_schema
from lightning_fl.cli import main
from lightning_fl.communication import Message
from lightning_fl.coordinator.audit import AuditLog, verify
from lightning_fl.coordinator.meetings import MAX_ENDED, SUM, Meetings, split_messages
from lightning_fl.coordinator.network_group import MeetingOver, NetworkGroup
from lightning_fl.coordinator.refused import Refused
from lightning_fl.privacy import SecureAggregation
from tests.helpers.network import (
    NAMES,
    LiveCoordinator,
    in_threads,
    live_coordinator,
    make_keys,
    make_kits,
    rules,
    settings,
)

LUNG = pd.read_csv(Path(__file__).parents[2] / "examples" / "lung.csv")
GRID = tuple(float(day) for day in range(1, 1101))


@pytest.fixture
def live(tmp_path: Path) -> Iterator[LiveCoordinator]:
    make_kits(tmp_path)
    make_keys(tmp_path)
    with live_coordinator(tmp_path, rules(), settings()) as own:
        yield own


def meet(live: LiveCoordinator, what: Callable[[NetworkGroup], Any]) -> list[Any]:
    """What each silo gets from a function of its group."""

    def silo(name: str) -> Any:
        with NetworkGroup(live.address, live.folder / name) as group:
            return what(group)

    return in_threads(*(lambda name=name: silo(name) for name in NAMES))


def rows(group: NetworkGroup) -> pd.DataFrame:
    return LUNG[LUNG.index % group.size == group.rank]


def test_collectives_are_those_of_any_group(live: LiveCoordinator) -> None:
    def check(group: NetworkGroup) -> Any:
        own = torch.arange(3.0) + group.rank
        told = [message.fields["rank"] for message in group.all_gather(Message({"rank": group.rank}), "ranks")]
        group.barrier()
        overflown = group.all_reduce(torch.tensor([2**31 - 1], dtype=torch.int32))
        reduced = [group.all_reduce(own, op).tolist() for op in ("sum", "mean", "min", "max")]
        return told, group.broadcast(own, 2).tolist(), reduced, int(overflown), list(group.names)

    sums = [[3.0, 6.0, 9.0], [1.0, 2.0, 3.0], [0.0, 1.0, 2.0], [2.0, 3.0, 4.0]]
    assert meet(live, check) == [([0, 1, 2], [2.0, 3.0, 4.0], sums, 2**31 - 3, list(NAMES))] * 3


QUESTIONS = [
    Variance("age"),
    Quantile("time", (0.25, 0.5, 0.9)),
    By(KaplanMeier("time", "status", grid=GRID), "sex", ("1", "2")),
    Frequency("sex", ("1", "2")),
]


@pytest.mark.parametrize("secure", [pytest.param(False, marks=pytest.mark.slow), True])
def test_silos_answer_as_the_pooled_table(live: LiveCoordinator, secure: bool) -> None:
    def check(group: NetworkGroup) -> dict[str, Any]:
        keys = SecureAggregation(keys=str(live.folder / group.names[group.rank] / "keys"))
        return analyze(QUESTIONS, rows(group), group=group, aggregator=keys if secure else None).to_dict()

    first, *others = meet(live, check)
    assert all(other == first for other in others)
    pooled = analyze(QUESTIONS, LUNG).to_dict()
    assert first["answers"][0]["variance"] == pytest.approx(82.32761418965917, rel=1e-12)
    assert first["answers"][1:] == pooled["answers"][1:]  # counts, bit for bit
    assert [event["silos"] for event in live.events("meeting begun")] == [list(NAMES)]
    assert live.events("meeting over")
    assert verify(live.folder / "east" / "state" / "questions.jsonl")[0] > 5


def test_under_secure_sums_the_coordinator_sees_masks(live: LiveCoordinator, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    put = Meetings.put

    def spy(self: Meetings, silo: str, name: str, step: int, kind: str, data: bytes, now: float) -> None:
        if kind == "sum":
            seen.append(Message.decode(data).tensors[SUM])
        put(self, silo, name, step, kind, data, now)

    monkeypatch.setattr(Meetings, "put", spy)

    def check(group: NetworkGroup, secure: bool) -> None:
        keys = SecureAggregation(keys=str(live.folder / group.names[group.rank] / "keys"))
        analyze([Frequency("sex", ("1", "2"))], rows(group), group=group, aggregator=keys if secure else None)

    meet(live, lambda group: check(group, secure=False))
    own = [float(count) for count in rows_of(0).sex.value_counts().sort_index()]
    assert any(set(own) <= set(tensor.tolist()) for tensor in seen)  # the negative control: in clear it sees the counts
    seen.clear()
    meet(live, lambda group: check(group, secure=True))
    masked = torch.stack(seen[:3])
    assert masked.dtype == torch.int32
    assert float((masked.abs() > 1 << 20).double().mean()) > 0.95


def rows_of(rank: int) -> pd.DataFrame:
    return LUNG[LUNG.index % 3 == rank]


def test_a_schema_names_the_silo(live: LiveCoordinator) -> None:
    def check(group: NetworkGroup) -> str:
        own = rows(group).rename(columns={"age": "agee"} if group.rank == 1 else {})
        with pytest.raises(ValueError, match="north has no column 'age'; it has 'agee'"):
            federated_schema(own, "status", group=group)
        return "told"

    assert meet(live, check) == ["told"] * 3


def test_a_silo_that_fails_is_named_to_the_others(live: LiveCoordinator) -> None:
    def silo(name: str) -> str:
        try:
            with NetworkGroup(live.address, live.folder / name) as group:
                group.barrier()
                if group.rank == 2:
                    raise KeyError("a mistake in its data")
                group.barrier()
        except MeetingOver as error:
            return str(error)
        except KeyError:
            return "failed"
        return ""

    found = in_threads(*(lambda name=name: silo(name) for name in NAMES))
    assert found == ["Silo 'south': 'a mistake in its data'"] * 2 + ["failed"]
    assert meet(live, lambda group: group.rank) == [0, 1, 2]  # and they can meet again


def test_the_command(live: LiveCoordinator, capsys: pytest.CaptureFixture[str]) -> None:
    def silo(rank: int, name: str) -> Any:
        rows_of(rank).to_csv(f"{name}.csv", index=False)
        words = f"--kit {live.folder / name} --json {name}.json --ledger {name}.ledger --secure --mean age --by sex=1,2"
        main(["analyze", f"{name}.csv", "--federation", live.address, *words.split()])
        return json.loads(Path(f"{name}.json").read_text())["answers"][0]["parts"]["2"]["mean"]

    found = in_threads(*(lambda rank=rank, name=name: silo(rank, name) for rank, name in enumerate(NAMES)))
    assert found == [pytest.approx(61.077777777777776, rel=1e-12)] * 3
    assert "Answers of 3 clients" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("policy", "words", "message"),
    [
        ("questions: [Mean]", "--mean age --quantile age", "The question is Quantile; policy.yaml allows Mean"),
        ("questions: [By]", "--mean age --by sex=1,2", "The question is Mean"),
        ("min_count: 10", "--mean age", "policy.yaml has min_count: 10"),
        ("require: secure aggregation", "--mean age", "policy.yaml requires secure aggregation"),
        ("", "--mean age --client inst", "Give only its own file"),
    ],
)
def test_a_silo_refuses_before_it_meets(
    tmp_path: Path, policy: str, words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make_kits(tmp_path, ("east",))
    if policy:
        (tmp_path / "east" / "policy.yaml").write_text(policy)
    LUNG.to_csv("own.csv", index=False)
    with pytest.raises(SystemExit):
        main(
            [
                "analyze",
                "own.csv",
                "--federation",
                "https://localhost:1",
                "--kit",
                str(tmp_path / "east"),
                *words.split(),
            ]
        )
    assert message in capsys.readouterr().err


# ---- the coordinator's side, without sockets

TOKENS = {name: f"{place:032x}" for place, name in enumerate(NAMES)}


@pytest.fixture
def meetings(tmp_path: Path) -> Meetings:
    return Meetings(NAMES, 100.0, AuditLog(tmp_path / "audit.jsonl"))


def begin(meetings: Meetings, now: float = 0.0) -> str:
    found = [meetings.come(name, TOKENS[name], now) for name in NAMES]
    assert [own["waits_for"] for own in found] == [["north", "south"], ["south"], []]
    return str(found[-1]["meeting"])


def test_a_silo_that_starts_again_ends_the_meeting(meetings: Meetings) -> None:
    name = begin(meetings)
    assert meetings.come("east", "f" * 32, 1.0)["waits_for"] == ["north", "south"]
    with pytest.raises(Refused, match="Silo 'east' has started again"):
        meetings.put("north", name, 0, "gather", b"x", 2.0)
    with pytest.raises(Refused, match="Silo 'east' has started again"):
        meetings.come("north", TOKENS["north"], 2.0)


def test_a_step_does_not_wait_for_ever(meetings: Meetings) -> None:
    name = begin(meetings)
    meetings.put("east", name, 0, "gather", b"x", 50.0)
    meetings.step(149.0)
    assert meetings.get("east", name, 0) is None
    meetings.step(151.0)
    with pytest.raises(Refused, match="No answer of north, south within 100 s"):
        meetings.get("east", name, 0)


def test_a_silo_that_only_came_by_is_not_counted(meetings: Meetings) -> None:
    meetings.come("east", TOKENS["east"], 0.0)
    assert meetings.come("north", TOKENS["north"], 61.0)["waits_for"] == ["east", "south"]


def test_calls_may_be_repeated(meetings: Meetings) -> None:
    name = begin(meetings)
    for silo in NAMES:
        for _ in range(2):
            meetings.put(silo, name, 0, "gather", silo.encode(), 1.0)
    assert split_messages(meetings.get("east", name, 0) or b"", 3) == [silo.encode() for silo in NAMES]
    for silo in NAMES:
        meetings.leave(silo, TOKENS[silo], "", 2.0)
    assert meetings.meeting is None


def test_who_asks_again_waits_until_the_others_have_read(meetings: Meetings) -> None:
    name = begin(meetings)
    for silo in NAMES:
        meetings.put(silo, name, 0, "gather", b"x", 1.0)
    meetings.leave("east", TOKENS["east"], "", 1.0)
    assert meetings.come("east", "f" * 32, 2.0)["waits_for"] == ["north", "south"]
    assert meetings.get("north", name, 0)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"no tensors", "is refused"),
        (Message({}, {"y": torch.zeros(2)}).encode(), "it adds torch.float32"),
        (Message({}, {SUM: torch.zeros(2), "y": torch.zeros(2)}).encode(), "is refused"),
        (Message({}, {SUM: torch.zeros(2).bool()}).encode(), "it adds torch.bool"),
        (Message({}, {SUM: torch.tensor([1.0, float("nan")])}).encode(), "NaN"),
    ],
)
def test_what_is_no_summand_is_refused(meetings: Meetings, data: bytes, message: str) -> None:
    name = begin(meetings)
    with pytest.raises(Refused, match=message):
        meetings.put("east", name, 0, "sum", data, 1.0)
    assert meetings.get("north", name, 0) is None  # it may send another


def test_other_numbers_or_steps_end_the_meeting(meetings: Meetings) -> None:
    name = begin(meetings)
    for silo, size in (("east", 2), ("north", 3)):
        meetings.put(silo, name, 0, "sum", Message({}, {SUM: torch.zeros(size)}).encode(), 1.0)
    with pytest.raises(Refused, match="Silo 'north' adds other numbers than 'east'"):
        meetings.put("south", name, 0, "sum", Message({}, {SUM: torch.zeros(2)}).encode(), 1.0)
    name = str([meetings.come(silo, TOKENS[silo].replace("0", "f", 1), 2.0) for silo in NAMES][-1]["meeting"])
    meetings.put("east", name, 0, "gather", b"x", 3.0)
    with pytest.raises(Refused, match="Silo 'north' is at another step"):
        meetings.put("north", name, 0, "sum", Message({}, {SUM: torch.zeros(2)}).encode(), 3.0)


@pytest.mark.parametrize("token", [None, "", "x" * 32, "0" * 31, 7])
def test_other_tokens_are_refused(meetings: Meetings, token: Any) -> None:
    with pytest.raises(Refused, match="32 hexadecimal digits"):
        meetings.come("east", token, 0.0)


def test_the_memory_of_ended_meetings_is_bounded(meetings: Meetings) -> None:
    for number in range(MAX_ENDED // 2):
        for silo in NAMES:
            meetings.come(silo, f"{number:031x}{NAMES.index(silo)}", 0.0)
        meetings.leave("east", f"{number:031x}0", "again", 0.0)
    assert len(meetings.ended) == MAX_ENDED
