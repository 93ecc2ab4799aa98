from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lightning_fl.communication import LocalGroup
from tests.helpers.federation import join_ranks

RunRanks = Callable[..., list[Any]]


def reduce_in_two_groups() -> tuple[float, float]:
    first, second = join_ranks(), join_ranks()
    return second.all_reduce(torch.tensor(10.0)).item(), first.all_reduce(torch.tensor(1.0)).item()


def test_two_federations_of_the_same_processes_stay_apart(run_ranks: RunRanks) -> None:
    assert run_ranks(2, reduce_in_two_groups) == [(20.0, 2.0)] * 2


def wait_for_a_rank_that_stays_away() -> tuple[str, float]:
    group = join_ranks(timeout=10.0)
    tensor = torch.tensor(5.0)
    if group.rank == 0:
        with pytest.raises(RuntimeError) as caught:
            group.all_reduce(tensor)
        return str(caught.value), tensor.item()
    return "", tensor.item()


def test_a_rank_that_stays_away_is_an_error_and_the_tensor_is_kept(run_ranks: RunRanks) -> None:
    (error, kept), _ = run_ranks(2, wait_for_a_rank_that_stays_away)
    assert error
    assert kept == 5.0


def test_a_federation_of_one_needs_no_connection() -> None:
    group = join_ranks()
    assert isinstance(group, LocalGroup)
    assert (group.rank, group.size) == (0, 1)
    group.barrier()
