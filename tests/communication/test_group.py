from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_fl.communication import LocalGroup, Message
from lightning_fl.communication import group as group_module
from tests.helpers.federation import join_ranks

WORLD_SIZES = [1, 2, 4]
DTYPES = [torch.bfloat16, torch.float32, torch.float64, torch.int64]
CASES = list(product(["sum", "mean", "min", "max"], DTYPES))

Case = tuple[str, torch.dtype]
RunRanks = Callable[..., list[Any]]


def tensor_of(rank: int, dtype: torch.dtype) -> Tensor:
    return torch.tensor([rank + 1, -rank, 0, 7]).to(dtype)


def reduce_tensors() -> dict[Case, Tensor]:
    group = join_ranks()
    joined = {}
    for op, dtype in CASES:
        tensor = tensor_of(group.rank, dtype)
        joined[op, dtype] = group.all_reduce(tensor, op)
        assert torch.equal(tensor, tensor_of(group.rank, dtype)), "all_reduce changed its input"
    return joined


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_all_reduce_joins_the_ranks_tensors_and_leaves_them_as_they_are(run_ranks: RunRanks, world_size: int) -> None:
    stacked = torch.stack([tensor_of(rank, torch.float64) for rank in range(world_size)])
    expected = {"sum": stacked.sum(0), "mean": stacked.mean(0), "min": stacked.amin(0), "max": stacked.amax(0)}
    for joined in run_ranks(world_size, reduce_tensors):
        for op, dtype in CASES:
            assert torch.equal(joined[op, dtype].double(), expected[op])
            assert joined[op, dtype].dtype == (torch.float32 if (op, dtype) == ("mean", torch.int64) else dtype)


def reduce_odd_tensors() -> list[Tensor]:
    group = join_ranks()
    odd = [torch.tensor(1.0), torch.zeros(0), torch.ones(2, requires_grad=True), torch.tensor([[0, 1], [2, 3]]).t()]
    return [group.all_reduce(tensor) for tensor in odd]


@pytest.mark.parametrize("world_size", [1, 2])
def test_all_reduce_takes_any_tensor(run_ranks: RunRanks, world_size: int) -> None:
    for scalar, empty, parameter, transposed in run_ranks(world_size, reduce_odd_tensors):
        assert (scalar.shape, scalar.item()) == ((), world_size)
        assert empty.shape == (0,)
        assert parameter.tolist() == [world_size, world_size]
        assert not parameter.requires_grad
        assert transposed.tolist() == [[0, 2 * world_size], [world_size, 3 * world_size]]


def gather_different_sizes() -> tuple[int, list[Message]]:
    group = join_ranks()
    message = Message({"rank": group.rank, "text": "x" * 1000 * group.rank}, {"t": torch.arange(float(group.rank))})
    return group.rank, group.all_gather(message)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_messages_of_different_sizes_arrive_in_the_order_of_ranks(run_ranks: RunRanks, world_size: int) -> None:
    for rank, (own_rank, messages) in enumerate(run_ranks(world_size, gather_different_sizes)):
        assert own_rank == rank
        assert [message.fields["rank"] for message in messages] == list(range(world_size))
        assert [len(message.fields["text"]) for message in messages] == [1000 * r for r in range(world_size)]
        assert [message.tensors["t"].tolist() for message in messages] == [list(range(r)) for r in range(world_size)]


def broadcast_from(root: int) -> tuple[Tensor, Tensor, Message]:
    group = join_ranks()
    tensor = torch.full((2,), float(group.rank))
    return group.broadcast(tensor, root), tensor, group.broadcast_message(Message({"rank": group.rank}), root)


@pytest.mark.parametrize(("world_size", "root"), [(1, 0), (2, 1), (4, 3)])
def test_broadcast_gives_every_rank_what_the_root_has(run_ranks: RunRanks, world_size: int, root: int) -> None:
    for rank, (received, own, message) in enumerate(run_ranks(world_size, broadcast_from, root)):
        assert received.tolist() == [root, root]
        assert own.tolist() == [rank, rank]
        assert message.fields == {"rank": root}


def send_with_limit(limits: list[int]) -> list[str]:
    group, default, refusals = join_ranks(), group_module.MAX_MESSAGE_BYTES, []
    for limit in limits:
        group_module.MAX_MESSAGE_BYTES = limit
        try:
            group.all_gather(Message({"text": "x" * (500 if group.rank == 1 else 5)}))
            refusals.append("")
        except ValueError as error:
            refusals.append(str(error))
        finally:
            group_module.MAX_MESSAGE_BYTES = default
    return refusals


def test_a_message_over_the_limit_is_refused_on_every_rank(run_ranks: RunRanks) -> None:
    for too_long, not_too_long in run_ranks(4, send_with_limit, [400, 4000]):
        assert "Rank 1 wants to send a message of" in too_long
        assert "at most 400 are taken" in too_long
        assert not_too_long == ""


def gather_at_different_places() -> str:
    group = join_ranks()
    with pytest.raises(RuntimeError) as caught:
        group.all_gather(Message(), f"round {group.rank}")
    return str(caught.value)


def test_ranks_that_have_lost_step_are_told_so(run_ranks: RunRanks) -> None:
    first, second = run_ranks(2, gather_at_different_places)
    assert "rank 1 is at 'round 1', rank 0 at 'round 0'" in first
    assert "rank 0 is at 'round 0', rank 1 at 'round 1'" in second


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


@pytest.mark.parametrize("collective", ["all_reduce", "broadcast"])
def test_what_one_rank_receives_is_its_own_copy(collective: str) -> None:
    tensor = torch.ones(2)
    getattr(LocalGroup(), collective)(tensor).zero_()
    assert tensor.tolist() == [1.0, 1.0]
