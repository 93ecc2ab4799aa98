"""Every group of ranks through every property: a new transport is one entry in ``ENTRIES``.

Each property is a function of the group, which runs on every rank and asserts there.
"""

from __future__ import annotations

import pickle
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_fl.communication import Group, LocalGroup, Message, RankLost, TorchGroup
from lightning_fl.communication import group as group_module
from lightning_fl.communication.silo import SiloGroup
from tests.contract.helpers import run_threads, shipped
from tests.helpers.federation import join_ranks
from tests.helpers.second_device import DEVICE, SecondDevice

Check = Callable[[Group], Any]
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGERS = (torch.uint8, torch.int32, torch.int64)


def run_alone(size: int, check: Check, timeout: float = 60.0) -> list[Any]:
    """What ``check`` returns in a group of one."""
    return [check(LocalGroup())]


@dataclass(frozen=True)
class Entry:
    """A group under contract.

    Args:
        kind: The group.
        run: ``run(size, check, timeout)`` gives what ``check(group)`` returns on each of ``size`` ranks.
        sizes: The numbers of ranks that it can join.
    """

    kind: type[Group]
    run: Callable[..., list[Any]]
    sizes: tuple[int, ...]


class Messenger(TorchGroup):
    """A transport of messages only: the collectives of tensors are those that every group inherits."""

    gather_tensor, all_to_all = Group.gather_tensor, Group.all_to_all


def run_silos(size: int, check: Check, timeout: float = 60.0) -> list[Any]:
    """What ``check`` returns on the first of two processes in each of ``size`` silos, which are threads."""
    stores = [dist.HashStore() for _ in range(size + 1)]
    limit, cpu = timedelta(seconds=timeout), torch.device("cpu")

    def run(place: int) -> Any:
        silo, process = divmod(place, 2)
        inner = TorchGroup(stores[silo], process, 2, cpu, limit)
        outer = TorchGroup(stores[size], silo, size, cpu, limit) if process == 0 else None
        # What leaves the silo is in the books of its first process.
        is_exempt = process > 0 and check is check_traffic_is_counted
        with suppress(AssertionError) if is_exempt else nullcontext():
            return check(SiloGroup(inner, outer, None, silo, size))

    with ThreadPoolExecutor(2 * size) as pool:
        return [process.result() for process in [pool.submit(run, place) for place in range(2 * size)]][::2]


ENTRIES = {
    "local": Entry(LocalGroup, run_alone, (1,)),
    "torch": Entry(TorchGroup, run_threads, (1, 2, 4)),
    "silos": Entry(SiloGroup, run_silos, (1, 2)),
}
every_group_and_size = pytest.mark.parametrize(
    ("entry", "size"), [pytest.param(e, size, id=f"{name}-{size}") for name, e in ENTRIES.items() for size in e.sizes]
)
every_group_of_two = pytest.mark.parametrize(
    "entry", [pytest.param(e, id=name) for name, e in ENTRIES.items() if 2 in e.sizes]
)


# ---- what holds in every group


def check_its_place(group: Group) -> None:
    ranks = [message.fields["rank"] for message in group.all_gather(Message({"rank": group.rank}))]
    assert ranks == list(range(group.size))


def check_all_reduce_joins_tensors(group: Group) -> None:
    """By their sum, mean, minimum and maximum; the rank's own tensor and the dtype stay."""

    def own(rank: int, dtype: torch.dtype) -> Tensor:
        return torch.tensor([rank + 1, 5 - rank, 0, 7]).to(dtype)

    stacked = torch.stack([own(rank, torch.float64) for rank in range(group.size)])
    expected = {"sum": stacked.sum(0), "mean": stacked.mean(0), "min": stacked.amin(0), "max": stacked.amax(0)}
    for op, dtype in product(expected, (*FLOATS, *INTEGERS)):
        tensor = own(group.rank, dtype)
        joined = group.all_reduce(tensor, op)
        assert torch.equal(joined.double(), expected[op]), (op, dtype)
        assert joined.dtype == (torch.float32 if op == "mean" and dtype in INTEGERS else dtype), (op, dtype)
        assert torch.equal(tensor, own(group.rank, dtype)), (op, dtype)
    negative = torch.tensor([-group.rank - 1, 2**40 + 1])
    assert group.all_reduce(negative).tolist() == [-sum(range(group.size + 1)), group.size * (2**40 + 1)]


def check_all_reduce_takes_any_tensor(group: Group) -> None:
    size = group.size
    scalar, empty = group.all_reduce(torch.tensor(1.0)), group.all_reduce(torch.zeros(0))
    assert (scalar.shape, scalar.item(), empty.shape) == ((), size, (0,))
    parameter = group.all_reduce(torch.ones(2, requires_grad=True))
    assert (parameter.tolist(), parameter.requires_grad) == ([size, size], False)
    transposed = group.all_reduce(torch.tensor([[0, 1], [2, 3]]).t())
    assert transposed.tolist() == [[0, 2 * size], [size, 3 * size]]


def check_all_ranks_get_the_same_bits(group: Group) -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(group.rank))
    for op in ("sum", "mean"):
        received = group.all_gather(Message({}, {"joined": group.all_reduce(values, op)}))
        assert all(torch.equal(message.tensors["joined"], received[0].tensors["joined"]) for message in received)


def check_what_a_rank_receives_is_its_own_copy(group: Group) -> None:
    for collective in (group.all_reduce, group.broadcast):
        own = torch.ones(2)
        collective(own).zero_()
        assert own.tolist() == [1.0, 1.0]


def check_messages_arrive_in_the_order_of_ranks(group: Group) -> None:
    """Whatever their sizes, with fields and tensors as they were sent."""

    def message_of(rank: int) -> Message:
        fields = {"rank": rank, "text": "ä\n\x00" * 1000 * rank, "nested": {"a": [1, None, True, {"b": 0.25}]}}
        tensors = {str(dtype): torch.arange(rank).to(dtype) for dtype in (*FLOATS, *INTEGERS, torch.bool)}
        return Message(fields, {**tensors, "view": torch.arange(6.0).reshape(2, 3).t() + rank})

    own = message_of(group.rank)
    received = group.all_gather(own)
    assert len(received) == group.size
    for rank, message in enumerate(received):
        expected = message_of(rank)
        assert message.fields == expected.fields
        assert message.tensors.keys() == expected.tensors.keys()
        torch.testing.assert_close(message.tensors, expected.tensors, rtol=0, atol=0)
    assert own.fields == message_of(group.rank).fields


def check_broadcast_gives_what_the_root_has(group: Group) -> None:
    for root, dtype in product(range(group.size), (*FLOATS, *INTEGERS, torch.bool)):
        own = torch.tensor([[group.rank % 2, 1], [0, 1]]).to(dtype).t()
        received = group.broadcast(own, root)
        assert received.dtype == dtype
        assert received.tolist() == [[root % 2, 0], [1, 1]]
        assert own.tolist() == [[group.rank % 2, 0], [1, 1]]


def check_gather_tensor_stacks_what_the_ranks_have(group: Group) -> None:
    for dtype in (*FLOATS, *INTEGERS):
        own = torch.tensor([[group.rank, 1], [2, 3]]).to(dtype).t()
        received = group.gather_tensor(own)
        assert received.dtype == dtype
        assert received.tolist() == [[[rank, 2], [1, 3]] for rank in range(group.size)]
        received.zero_()
        assert own.tolist() == [[group.rank, 2], [1, 3]]


def check_all_to_all_delivers_each_part_to_its_rank(group: Group) -> None:
    """Rank r sends r + s elements to rank s, so that one part is empty."""
    for dtype in (*FLOATS, *INTEGERS):
        parts = [torch.full((group.rank + rank,), 10 * group.rank + rank).to(dtype) for rank in range(group.size)]
        received = group.all_to_all(parts, [rank + group.rank for rank in range(group.size)])
        assert [part.dtype for part in received] == [dtype] * group.size
        assert [part.tolist() for part in received] == [
            [10 * rank + group.rank] * (rank + group.rank) for rank in range(group.size)
        ]
        for part in received:
            part.zero_()
        assert [part.tolist() for part in parts] == [
            [10 * group.rank + rank] * (group.rank + rank) for rank in range(group.size)
        ]


def check_broadcast_message_gives_what_the_root_says(group: Group) -> None:
    own = Message({"rank": group.rank}, {"t": torch.tensor(group.rank)})
    received = [group.broadcast_message(own, root) for root in range(group.size)]
    assert [message.fields for message in received] == [{"rank": root} for root in range(group.size)]
    assert [message.tensors["t"].item() for message in received] == list(range(group.size))


def check_nobody_passes_a_barrier_before_all_have_come(group: Group) -> None:
    group.all_gather(Message())  # all start together, and one is late
    time.sleep(0.3 if group.rank == group.size - 1 else 0.0)
    came = time.monotonic()
    group.barrier()
    passed = time.monotonic()
    times = [message.fields for message in group.all_gather(Message({"came": came, "passed": passed}))]
    assert len(times) == group.size
    assert max(one["came"] for one in times) <= min(one["passed"] for one in times)


def check_ranks_that_are_out_of_sync_are_told_where_all_are(group: Group) -> None:
    """On every rank, which may go on afterwards."""
    if group.size > 1:
        other = 1 if group.rank == 0 else 0
        expected = f"rank {other} is at 'round {other}', rank {group.rank} at 'round {group.rank}'"
        with pytest.raises(RuntimeError, match=expected):
            group.all_gather(Message(), f"round {group.rank}")
    assert len(group.all_gather(Message(), "round 5")) == group.size


def check_traffic_is_counted(group: Group) -> None:
    """Bytes of each collective, and seconds on a rank that waits for a slow one; a group of one has none."""
    tensor, message = torch.zeros(1000, dtype=torch.float64), Message({}, {"t": torch.zeros(500)})
    slow, is_last = 0.2, group.rank == group.size - 1

    def bytes_of(collective: Callable[[], Any]) -> int:
        before = group.traffic.num_bytes
        group.barrier()
        time.sleep(slow if is_last else 0.0)
        collective()
        return group.traffic.num_bytes - before

    reduced, gathered = bytes_of(lambda: group.all_reduce(tensor)), bytes_of(lambda: group.all_gather(message))
    sent = bytes_of(lambda: group.broadcast(tensor, group.size - 1))
    stacked, size = bytes_of(lambda: group.gather_tensor(tensor)), group.size
    dealt = bytes_of(lambda: group.all_to_all([tensor[:8]] * size, [8] * size))
    if isinstance(group, LocalGroup):
        assert (reduced, gathered, sent, stacked, dealt) == (0, 0, 0, 0, 0)
        return
    assert (reduced, sent) == (8000, 8000)
    # A transport of messages adds their headers.
    assert 8000 <= stacked < 8500
    assert 64 * size <= dealt < 64 * size + 500 + 200 * size
    assert 2000 <= gathered < 2500
    if not is_last:
        assert group.traffic.seconds_reducing > slow / 10
        assert group.traffic.seconds_waiting > slow / 10


def check_tensors_come_back_to_the_device_they_are_on(group: Group) -> None:
    with SecondDevice():
        own = torch.tensor([1.0, 2.0]).to(DEVICE) * (group.rank + 1)
        there = [group.all_reduce(own, op) for op in ("sum", "mean", "min", "max")]
        there += [
            group.broadcast(own),
            group.gather_tensor(own),
            *group.all_to_all([own] * group.size, [2] * group.size),
        ]
        assert {tensor.device for tensor in there} == {DEVICE}
        joined, mean, least, most, first, all_ranks, *_ = [tensor.cpu() for tensor in there]
    size = group.size
    assert joined.tolist() == [size * (size + 1) / 2, size * (size + 1)]
    assert mean.tolist() == [(size + 1) / 2, size + 1]
    assert (least.tolist(), most.tolist(), first.tolist()) == ([1.0, 2.0], [size, 2 * size], [1.0, 2.0])
    assert all_ranks.tolist() == [[rank + 1, 2 * rank + 2] for rank in range(size)]


CHECKS: list[Check] = [value for name, value in globals().items() if name.startswith("check_")]


def test_every_shipped_group_is_under_contract() -> None:
    assert {entry.kind for entry in ENTRIES.values()} == shipped(Group, "lightning_fl.communication")


@every_group_and_size
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
@pytest.mark.spread(42)
def test_it_keeps_the_contract(entry: Entry, size: int, check: Check) -> None:
    entry.run(size, check)


@pytest.mark.parametrize(
    "check", [check_gather_tensor_stacks_what_the_ranks_have, check_all_to_all_delivers_each_part_to_its_rank]
)
def test_a_transport_of_messages_has_the_collectives_of_tensors(check: Check) -> None:
    run_threads(2, check, kind=Messenger)


@pytest.mark.parametrize(("gpus", "sentence"), [("AA", "2 ranks share 1 GPU"), ("AABB", "4 ranks share 2 GPU")])
def test_ranks_that_share_a_gpu_send_over_gloo(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, gpus: str, sentence: str
) -> None:
    class OnGpus(TorchGroup):
        def __init__(self, store: Any, rank: int, size: int, device: Any, limit: Any) -> None:
            monkeypatch.setattr(group_module, "_identify", lambda gpu: gpus[gpu.index])
            super().__init__(store, rank, size, torch.device("cuda", rank), limit)

    run_threads(len(gpus), check_all_reduce_joins_tensors, kind=OnGpus)
    assert sentence in caplog.text
    assert len(caplog.records) == 1


def test_ranks_with_a_gpu_each_ask_for_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpus(TorchGroup):
        def __init__(self, store: Any, rank: int, size: int, device: Any, limit: Any) -> None:
            monkeypatch.setattr(group_module, "_identify", lambda gpu: str(gpu.index))
            monkeypatch.setattr(torch.distributed, "ProcessGroupNCCL", Nccl, raising=False)
            super().__init__(store, rank, size, torch.device("cuda", rank), limit)

    class Nccl:
        Options = SimpleNamespace

        def __init__(self, *args: Any) -> None:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_threads(2, check_its_place, kind=OnGpus)


def check_all() -> None:
    group = join_ranks()
    for check in CHECKS:
        check(group)


@pytest.mark.parametrize("world_size", [1, 2])  # threads have shown it for 4: a process takes 5 s to start
@pytest.mark.spread(1)
def test_connected_processes_keep_the_contract(run_ranks: Any, world_size: int) -> None:
    run_ranks(world_size, check_all)


# ---- what holds when another rank fails


@every_group_of_two
@pytest.mark.parametrize(
    "collective", ["all_reduce", "all_gather", "broadcast", "barrier", "gather_tensor", "all_to_all"]
)
@pytest.mark.spread(1)
def test_a_rank_that_stays_away_is_an_error_in_time(entry: Entry, collective: str) -> None:
    """Rank 1 is there and does not come; rank 0 keeps its tensor."""
    done = threading.Event()

    def wait_for_it(group: Group) -> None:
        tensor = torch.tensor(5.0)
        given = {"all_reduce": (tensor,), "all_gather": (Message(),), "broadcast": (tensor, 1), "barrier": ()}
        given |= {"gather_tensor": (tensor,), "all_to_all": ([tensor[None]] * 2, [1, 1])}
        if group.rank == 1:
            assert done.wait(60)
            return
        start = time.monotonic()
        with pytest.raises(RankLost, match=r"has left the federation, or has not come .* within 1\.5 s"):
            getattr(group, collective)(*given[collective])
        seconds = time.monotonic() - start
        done.set()
        assert 1 < seconds < 30
        assert tensor.item() == 5.0

    entry.run(2, wait_for_it, timeout=1.5)


@every_group_of_two
@pytest.mark.spread(1)
def test_a_rank_that_has_left_is_an_error_at_once(entry: Entry) -> None:
    def wait_for_it(group: Group) -> None:
        if group.rank == 0:
            start = time.monotonic()
            with pytest.raises(RankLost):
                group.all_reduce(torch.ones(2))
            assert time.monotonic() - start < 15

    entry.run(2, wait_for_it, timeout=30.0)


@every_group_of_two
def test_bytes_that_are_no_message_are_refused_on_every_rank(entry: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = Message.encode

    def encode_or_attack(message: Message) -> bytes:
        return pickle.dumps(message) if "attack" in repr(message.fields) else encode(message)

    monkeypatch.setattr(Message, "encode", encode_or_attack)

    def gather(group: Group) -> None:
        with pytest.raises(ValueError, match=r"A rank sent \d+ bytes that are not a valid message"):
            group.all_gather(Message({"attack": True} if group.rank == 1 else {}))

    entry.run(2, gather)


@every_group_of_two
def test_a_message_over_the_limit_is_refused_on_every_rank(entry: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    def gather(group: Group) -> None:
        message = Message({"text": "x" * (500 if group.rank == 1 else 5)})
        if group_module.MAX_MESSAGE_BYTES == 400:
            with pytest.raises(ValueError, match=r"Rank 1 wants to send a message of \d+ bytes; at most 400 are"):
                group.all_gather(message)
        else:
            assert len(group.all_gather(message)) == 2

    for limit in (400, 4000):
        monkeypatch.setattr(group_module, "MAX_MESSAGE_BYTES", limit)
        entry.run(2, gather)


# ---- groups that break the contract, so that each property is known to find something


class Alone(TorchGroup):
    """Hears nobody else."""

    def all_reduce(self, tensor: Tensor, op: str = "sum") -> Tensor:
        return tensor.clone()

    def all_gather(self, message: Message, topic: str = "") -> list[Message]:
        return [message]

    def broadcast(self, tensor: Tensor, root: int = 0) -> Tensor:
        return tensor.clone()

    def gather_tensor(self, tensor: Tensor) -> Tensor:
        return torch.stack([tensor] * self.size)

    def all_to_all(self, parts: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
        return [part.clone() for part in parts]


class InPlace(TorchGroup):
    def all_reduce(self, tensor: Tensor, op: str = "sum") -> Tensor:
        return tensor.copy_(super().all_reduce(tensor, op))


class AsFloat(TorchGroup):
    def all_reduce(self, tensor: Tensor, op: str = "sum") -> Tensor:
        return super().all_reduce(tensor.float(), op).to(tensor.dtype)


class OwnFirst(TorchGroup):
    def all_gather(self, message: Message, topic: str = "") -> list[Message]:
        received = super().all_gather(message, topic)
        return [received[self.rank], *received[: self.rank], *received[self.rank + 1 :]]


class Drifts(TorchGroup):
    def all_reduce(self, tensor: Tensor, op: str = "sum") -> Tensor:
        return super().all_reduce(tensor, op) * (1 + 1e-6 * self.rank)


class KeepsGraph(TorchGroup):
    def all_reduce(self, tensor: Tensor, op: str = "sum") -> Tensor:
        return super().all_reduce(tensor, op).requires_grad_(tensor.requires_grad)


class OpenBarrier(TorchGroup):
    def barrier(self) -> None:
        return None


class HearsNoTopic(TorchGroup):
    def all_gather(self, message: Message, topic: str = "") -> list[Message]:
        return super().all_gather(message)


class FreeOfCharge(TorchGroup):
    def broadcast(self, tensor: Tensor, root: int = 0) -> Tensor:
        before = self.traffic.num_bytes
        received = super().broadcast(tensor, root)
        self.traffic.num_bytes = before
        return received


@pytest.mark.parametrize(
    ("broken", "check"),
    [
        (Alone, check_its_place),
        (Alone, check_messages_arrive_in_the_order_of_ranks),
        (Alone, check_broadcast_gives_what_the_root_has),
        (Alone, check_gather_tensor_stacks_what_the_ranks_have),
        (Alone, check_all_to_all_delivers_each_part_to_its_rank),
        (AsFloat, check_all_reduce_joins_tensors),
        (InPlace, check_all_reduce_joins_tensors),
        (InPlace, check_what_a_rank_receives_is_its_own_copy),
        (KeepsGraph, check_all_reduce_takes_any_tensor),
        (Drifts, check_all_ranks_get_the_same_bits),
        (OwnFirst, check_messages_arrive_in_the_order_of_ranks),
        (OwnFirst, check_broadcast_message_gives_what_the_root_says),
        (OpenBarrier, check_nobody_passes_a_barrier_before_all_have_come),
        (HearsNoTopic, check_ranks_that_are_out_of_sync_are_told_where_all_are),
        (FreeOfCharge, check_traffic_is_counted),
    ],
)
def test_a_breach_is_found(broken: type[TorchGroup], check: Check) -> None:
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        run_threads(2, check, kind=broken)
