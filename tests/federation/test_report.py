"""A rank's report: its way through a message, and how the reports of all ranks become one."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from lightning_fl.communication import Message
from lightning_fl.engines import ScheduleEnd
from lightning_fl.federation import RankReport
from lightning_fl.federation.errors import ConfigurationError
from lightning_fl.federation.report import SECRET_FIELDS
from lightning_fl.federation.report_masking import mask, unmask


def entry(value: float, weight: float, reduction: str = "mean") -> dict[str, Any]:
    return {"name": "loss", "reduction": reduction, "value": value, "weight": weight}


END = ScheduleEnd([3, 0], [[{"lr": 0.1, "betas": (0.9, 0.99), "maximize": False}], [{"lr": 0.5}]], 7)
FIRST = RankReport(
    num_clients=2,
    weight=5.5,
    num_steps=7,
    num_examples=12,
    squared_norm=0.25,
    schedule_end=END,
    refused=["a", 1],
    lost=[2],
    empty=["e"],
    failed=[("f", "OSError: no"), (3, "ValueError: no")],
    metrics={"training_step.loss": entry(6.0, 4.0), "training_step.most": entry(2.0, 1.0, "max")},
    metric_states={"accuracy": {"count": 2, "lengths": {"tp": None}, "is_sum": True}},
    has_late_values=True,
    logger_steps=7,
    should_stop=True,
    deferred_checkpoints={"a.ckpt": False},
    tensors={"accuracy/tp/0": torch.tensor([1, 2])},
)
SECOND = replace(
    FIRST,
    num_clients=1,
    weight=1.0,
    num_steps=9,
    num_examples=3,
    squared_norm=0.5,
    schedule_end=replace(END, num_optimizer_steps=9),
    refused=[4],
    lost=[],
    empty=[5],
    failed=[],
    metrics={"training_step.loss": entry(1.0, 1.0), "training_step.most": entry(3.0, 1.0, "max")},
    has_late_values=False,
    logger_steps=1,
    should_stop=False,
)


def assert_equal(found: RankReport, expected: RankReport) -> None:
    for name in (own.name for own in fields(RankReport)):
        mine, theirs = getattr(found, name), getattr(expected, name)
        if isinstance(mine, ScheduleEnd):
            assert (mine.num_steps, mine.num_optimizer_steps) == (theirs.num_steps, theirs.num_optimizer_steps)
            mine, theirs = mine.options, theirs.options
        assert repr(mine) == repr(theirs), name


@pytest.mark.parametrize("report", [RankReport(), FIRST, SECOND], ids=["empty", "first", "second"])
def test_it_comes_through_a_message(report: RankReport) -> None:
    received = RankReport.from_message(Message.decode(report.to_message().encode()))
    assert_equal(received, report)


def test_an_option_that_is_a_tensor_arrives_as_a_number() -> None:
    report = RankReport(schedule_end=ScheduleEnd([], [[{"lr": torch.tensor(0.5)}]], 7))
    end = RankReport.from_message(Message.decode(report.to_message().encode())).schedule_end
    assert end == ScheduleEnd([], [[{"lr": 0.5}]], 7)


def test_reports_are_joined_field_by_field() -> None:
    joined = RankReport.join([FIRST, SECOND])
    expected = replace(
        FIRST,
        num_clients=3,
        weight=6.5,
        num_steps=16,
        num_examples=15,
        squared_norm=0.75,
        schedule_end=SECOND.schedule_end,
        refused=["a", 1, 4],
        empty=["e", 5],
        metrics={
            "training_step.loss": entry(7.0, 5.0),
            "training_step.most": {**entry(0.0, 2.0, "max"), "value": torch.tensor(3.0)},
        },
        logger_steps=8,
    )
    assert_equal(joined, expected)


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 2, 0]], ids=str)
def test_the_schedules_go_where_the_client_with_the_most_steps_has_taken_them(order: list[int]) -> None:
    ends = [replace(END, num_optimizer_steps=2), None, replace(END, num_optimizer_steps=5)]
    joined = RankReport.join([RankReport(schedule_end=ends[place]) for place in order])
    assert joined.schedule_end is ends[2]
    assert RankReport.join([RankReport(), RankReport()]).schedule_end is None


def test_joining_one_report_changes_nothing() -> None:
    assert_equal(RankReport.join([FIRST]), FIRST)


@pytest.mark.parametrize("name", [own.name for own in fields(RankReport) if own.name != "tensors"])
def test_a_missing_field_is_refused(name: str) -> None:
    message = FIRST.to_message()
    short = Message({key: value for key, value in message.fields.items() if key != name}, message.tensors)
    with pytest.raises(ValueError, match=f"report lacks {name}. Start all ranks with the same version"):
        RankReport.from_message(short)


def test_fields_of_a_newer_version_are_ignored() -> None:
    message = FIRST.to_message()
    assert_equal(RankReport.from_message(Message({**message.fields, "new": 1}, message.tensors)), FIRST)


def test_the_number_of_steps_is_left_out_where_no_schedule_stepped() -> None:
    still = replace(FIRST, schedule_end=replace(END, num_steps=[0, 0]))
    end = still.without_steps().schedule_end
    assert end is not None
    assert end.num_optimizer_steps == 0
    assert FIRST.without_steps() == FIRST
    assert RankReport().without_steps() == RankReport()


def test_what_tells_of_a_clients_data_is_secret() -> None:
    assert SECRET_FIELDS == ("num_steps", "num_examples", "squared_norm", "logger_steps")


def test_values_that_come_after_a_secure_sum_are_refused_on_every_rank() -> None:
    reports = [mask(replace(one, metrics={}, metric_states={}).to_message()) for one in (SECOND, FIRST)]
    with pytest.raises(ConfigurationError, match="Under secure aggregation log it in `training_step`"):
        unmask(reports)
