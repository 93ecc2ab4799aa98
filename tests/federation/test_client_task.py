"""A client group's turn in a round: its losses, sizes and steps in closed form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from lightning_fl.aggregation import WeightedMean
from lightning_fl.algorithms import FedAvg
from lightning_fl.clients.local_work import BatchPosition
from lightning_fl.engines import ClientFacts, ScheduleEnd
from lightning_fl.federation import ClientGroup, ClientTask, FederationSettings
from lightning_fl.types import Phase

NEXT, END_OF_PASS = BatchPosition(0), BatchPosition(0, ends_pass=True)
FACTS = ClientFacts(3, {"x": 0.3}, 2.5, ScheduleEnd([], [], 3), 4)


def task_of(
    num_clients: int = 1,
    sizes: Sequence[int | None] = (),
    phases: Sequence[Phase] = (Phase(),),
    weighting: Any = "examples",
) -> ClientTask:
    settings = FederationSettings(FedAvg(), WeightedMean(), (), weighting, 0, population=num_clients)
    group = ClientGroup(settings, {"params": {"x": torch.zeros(1)}}, range(num_clients), [{}] * num_clients)
    return ClientTask(group, iter(()), phases, sizes or [None] * num_clients)


def runs(task: ClientTask) -> list[Any]:
    return task.runs([FACTS] * len(task.clients))


@pytest.mark.parametrize("mask", [None, (0,)], ids=["read at once", "read in the end"])
def test_the_loss_of_a_client_is_the_mean_over_its_examples(mask: Any) -> None:
    task = task_of()
    task.record(NEXT, 4, torch.tensor(1.0), mask)
    task.record(END_OF_PASS, 2, torch.tensor(4.0), mask)
    (run,) = runs(task)
    assert run.loss == (4 * 1 + 2 * 4) / 6
    assert (run.num_examples, run.weight) == (6, 6.0)
    assert (run.num_steps, run.lr_sum, run.normalizer) == (3, {"x": 0.3}, 2.5)


@pytest.mark.parametrize("mask", [None, (0,)], ids=["read at once", "read in the end"])
def test_a_skipped_batch_counts_the_same_wherever_losses_are_read(mask: Any) -> None:
    task = task_of()
    task.record(NEXT, 4, torch.tensor(3.0), mask)
    task.record(END_OF_PASS, 2, None)
    (run,) = runs(task)
    assert (run.loss, run.num_examples) == (4 * 3 / 6, 6)


@pytest.mark.parametrize("num_clients", [1, 2])
def test_without_any_loss_there_is_none(num_clients: int) -> None:
    task = task_of(num_clients)
    task.record(END_OF_PASS, 4, None)
    assert all(math.isnan(run.loss) for run in runs(task))
    assert all(math.isnan(run.loss) for run in runs(task_of(num_clients)))


def test_clients_side_by_side_have_their_own_losses() -> None:
    task = task_of(3, [5, 6, 7])
    task.record(NEXT, 4, torch.tensor([1.0, 2.0, 3.0]))
    task.record(END_OF_PASS, 1, torch.tensor([6.0, 7.0, 8.0]))
    assert [run.loss for run in runs(task)] == pytest.approx([2.0, 3.0, 4.0], rel=1e-12)
    assert [run.num_examples for run in runs(task)] == [5, 6, 7]
    assert task.steps_by_client is None


def test_clients_that_sit_out_a_step() -> None:
    task = task_of(3, [8, 6, 4])
    task.record(NEXT, 4, torch.tensor([1.0, 2.0, 3.0]), (0, 1, 2))
    task.record(NEXT, 2, torch.tensor([8.0]), (1,))
    task.record(NEXT, 4, torch.tensor([5.0]), (0,))
    task.record(END_OF_PASS, 0, None, (0, 2))
    assert [run.loss for run in runs(task)] == pytest.approx([3.0, (4 * 2 + 2 * 8) / 6, 3.0], rel=1e-12)
    assert task.steps_by_client == [3, 2, 2]


def test_the_size_is_that_of_one_pass() -> None:
    task = task_of()
    for position in (NEXT, END_OF_PASS, NEXT, NEXT):
        task.record(position, 3, torch.tensor(1.0))
    assert runs(task)[0].num_examples == 6
    known = task_of(sizes=[6])
    known.record(NEXT, 3, torch.tensor(1.0))
    assert runs(known)[0].num_examples == 6


def test_without_a_whole_pass_the_size_is_what_was_seen() -> None:
    task = task_of()
    task.record(NEXT, 3, torch.tensor(1.0))
    assert runs(task)[0].num_examples == 3


@pytest.mark.parametrize(("weighting", "weight"), [("examples", 9.0), ("uniform", 1.0)])
def test_the_weight_follows_the_weighting(weighting: str, weight: float) -> None:
    task = task_of(sizes=[9], weighting=weighting)
    task.record(END_OF_PASS, 3, torch.tensor(1.0))
    assert runs(task)[0].weight == weight


def test_only_phases_that_train_what_is_sent_count() -> None:
    task = task_of(phases=[Phase(), Phase(model="own"), Phase()])
    task.record(END_OF_PASS, 3, torch.tensor(1.0))
    assert task.counts
    assert task.next_phase().model == "own"
    task.record(END_OF_PASS, 3, torch.tensor(100.0))
    assert not task.counts
    task.next_phase()
    task.record(END_OF_PASS, 3, torch.tensor(2.0))
    (run,) = runs(task)
    assert (run.loss, run.num_examples) == (1.5, 3)
