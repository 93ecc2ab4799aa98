"""In which steps clients of unequal work train side by side."""

from __future__ import annotations

import math
import random

import pytest

from lightning_fl.engines.vectorized.step_schedule import group_clients, step_masks


def test_those_who_have_more_go_on_while_others_are_done() -> None:
    assert step_masks(["aaa", "a", "aa"]) == [(0, 1, 2), (0, 2), (0,)]


def test_a_last_batch_of_another_size_waits_for_others_of_its_size() -> None:
    assert step_masks(["aab", "ab", "b"]) == [(0, 1), (0,), (0, 1, 2)]


def test_with_counted_steps_it_can_wait_only_for_those_at_the_same_step() -> None:
    assert sorted(step_masks(["aab", "ab", "b"], math.inf)) == [(0,), (0,), (0, 1), (1,), (2,)]


def test_a_first_step_can_be_set_apart() -> None:
    assert step_masks(["ab", "b", "bb"], 1) == [(1, 2), (0,), (0, 2)]


@pytest.mark.parametrize("num_apart", [0, 1, math.inf])
def test_each_client_trains_each_of_its_batches_once_and_in_order(num_apart: float) -> None:
    draw = random.Random(0)
    works = ["".join(draw.choices("aaab", k=draw.randint(1, 9))) for _ in range(12)]
    trained = [""] * len(works)
    for tick in step_masks(works, num_apart):
        (kind,) = {works[row][len(trained[row])] for row in tick}
        assert len({min(len(trained[row]), num_apart) for row in tick}) == 1
        assert list(tick) == sorted(tick)
        for row in tick:
            trained[row] += kind
    assert trained == works


def test_clients_stay_apart_where_that_takes_less_time() -> None:
    assert group_clients(["a" * 3, "a" * 4, "a" * 5]) == [[0], [1], [2]]  # 12 steps alone, or 5 that take as long as 20
    assert group_clients(["aaa", "bbb", "aaa", "bbb"]) == [[0, 2], [1, 3]]
    works = ["a" * n for n in (3, 4, 5, 6, 2)]
    assert group_clients(works) == [[0], [1], [2], [3], [4]]  # 20, or 6 that take as long as 24
    works += ["a" * 5, "a"]
    assert group_clients(works) == [[0, 1, 2, 3, 4, 5, 6]]  # 16 and 5 that take as long as 10, or 24
    assert group_clients(works, compute_bound=1.0) == [[0], [1], [2, 5], [3], [4], [6]]


def test_only_equal_ones_where_others_must_not() -> None:
    works = ["aaab", "aab", "aaab", "ab"]
    assert group_clients(works, wants_equal=True) == [[0, 2], [1], [3]]
    assert group_clients(["aab"] * 3) == [[0, 1, 2]]
    assert group_clients([]) == []
