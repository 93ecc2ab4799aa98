from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning_fl.federation.plan import BatchPosition, RoundPlan
from lightning_fl.federation.round_loader import UNKNOWN_LENGTH, RoundLoader
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler

from lightning_fl.clients.local_work import LocalWork
from lightning_fl.data.client_loaders import ClientLoaders, count_batches

LENGTHS = {"a": 1, "b": 4, "c": 3}

Batch = tuple[str, int]


class WithoutLength:
    """Yields the batches of another loader, and can't tell how many."""

    def __init__(self, batches: Sequence[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


class WithWrongLength(WithoutLength):
    def __len__(self) -> int:
        return len(self.batches) + 1


def batches_of(client: str) -> list[Batch]:
    return [(client, index) for index in range(LENGTHS[client])]


class Driver:
    """Runs rounds as a training loop does: asks for the place of each batch after it has been trained.

    Args:
        loaders: The clients' loaders.
        work: How much each client trains.
        prepare: Changes a client's loader before it is read.
    """

    def __init__(self, loaders: dict[str, Any], work: LocalWork, prepare: Callable[[Any], Any] = lambda it: it) -> None:
        self.events: list[Any] = []
        self.work = work
        self.prepare = prepare
        self.clients = ClientLoaders(loaders)
        self.loader = RoundLoader(
            self.clients.__getitem__,
            plan=lambda: (self.plan, self.work),
            open_round=lambda: self.events.append("open"),
            open_client=self._open_client,
            resolved=lambda: self.events.append("resolved"),
        )
        self.new_round(0)

    def new_round(self, round: int) -> None:
        segments = {client: self.work.segments(count_batches(self.clients[client])) for client in self.clients}
        trained = [client for client in segments if segments[client]]
        own = [segments[client] for client in trained]
        self.plan = RoundPlan(round, list(self.clients), trained, own, self.work.accumulate)

    def run(self) -> tuple[list[Any], list[BatchPosition]]:
        batches, places = [], []
        for index, batch in enumerate(self.loader):
            self.events.append(batch)
            batches.append(batch)
            if self.plan.clients:
                places.append(self.plan.locate(index))
        return batches, places

    def _open_client(self, client: Any, loader: Any) -> Any:
        self.events.append(f"open {client}")
        return self.prepare(loader)


def driver(work: LocalWork, sized: bool = True, clients: str = "abc") -> Driver:
    return Driver({c: batches_of(c) if sized else WithoutLength(batches_of(c)) for c in clients}, work)


def step_counts(batches: list[Batch], places: list[BatchPosition]) -> dict[str, int]:
    steps: dict[str, int] = {}
    for (client, _), place in zip(batches, places, strict=True):
        steps[client] = steps.get(client, 0) + place.ends_window
    return steps


@pytest.mark.parametrize("sized", [True, False])
@pytest.mark.parametrize("epochs", [1, 2])
def test_clients_come_one_after_the_other_each_with_all_its_passes(epochs: int, sized: bool) -> None:
    rounds = driver(LocalWork(epochs=epochs), sized)
    assert len(rounds.loader) == (8 * epochs if sized else UNKNOWN_LENGTH)
    batches, places = rounds.run()
    assert batches == [batch for client in "abc" for batch in batches_of(client) * epochs]
    assert ["abc"[place.client] for place in places] == [client for client, _ in batches]
    assert [place.ends_round for place in places] == [False] * (8 * epochs - 1) + [True]
    assert len(rounds.loader) == 8 * epochs


def test_a_client_is_opened_only_when_its_first_batch_is_read() -> None:
    rounds = driver(LocalWork())
    rounds.run()
    assert rounds.events == [
        "open",
        *("open a", ("a", 0)),
        *("open b", ("b", 0), ("b", 1), ("b", 2), ("b", 3)),
        *("open c", ("c", 0), ("c", 1), ("c", 2)),
    ]


def test_the_prepared_loader_is_the_one_that_is_read() -> None:
    batches, _ = Driver({"c": batches_of("c")}, LocalWork(), prepare=lambda loader: loader[::-1]).run()
    assert batches == batches_of("c")[::-1]


@given(
    st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=4),
    st.builds(LocalWork, st.integers(1, 3), st.none() | st.integers(1, 7), st.integers(1, 4), st.integers(1, 6)),
)
def test_batches_and_plan_agree_for_any_loaders_and_work(clients: list[tuple[int, bool]], work: LocalWork) -> None:
    loaders = {
        f"{index}": [(f"{index}", batch) for batch in range(length)] if sized else WithoutLength([(f"{index}", 0)])
        for index, (length, sized) in enumerate(clients)
    }
    rounds = Driver(loaders, work)
    if not rounds.plan.clients:
        assert rounds.run()[0] == [None]
        return
    batches, places = rounds.run()
    assert [rounds.plan.clients[place.client] for place in places] == [client for client, _ in batches]
    assert sum(place.ends_client for place in places) == len(rounds.plan.clients)
    assert places[-1].ends_round
    assert len(rounds.loader) == len(batches)
    if work.steps is not None:
        assert step_counts(batches, places) == dict.fromkeys(rounds.plan.clients, work.steps)


@pytest.mark.parametrize("sized", [True, False])
@pytest.mark.parametrize(("steps", "accumulate"), [(1, 1), (10, 1), (3, 2)])
def test_local_steps_are_taken_exactly_whatever_the_loader(steps: int, accumulate: int, sized: bool) -> None:
    rounds = driver(LocalWork(steps=steps, accumulate=accumulate), sized)
    assert len(rounds.loader) == 3 * steps * accumulate
    batches, places = rounds.run()
    assert step_counts(batches, places) == dict.fromkeys("abc", steps)
    assert batches[-steps * accumulate :] == (batches_of("c") * 10)[: steps * accumulate]


def test_local_steps_see_a_fresh_order_at_each_pass() -> None:
    loader = DataLoader(range(50), batch_size=10, shuffle=True, generator=torch.Generator().manual_seed(0))
    batches, _ = Driver({"a": loader}, LocalWork(steps=10)).run()
    first, second = torch.cat(batches[:5]).tolist(), torch.cat(batches[5:]).tolist()
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second


@pytest.mark.parametrize("sized", [True, False])
@pytest.mark.parametrize(
    ("work", "expected"),
    [
        (LocalWork(limit=2), ["a0", "b0", "b1", "c0", "c1"]),
        (LocalWork(limit=2, epochs=2), ["a0", "a0", "b0", "b1", "b0", "b1", "c0", "c1", "c0", "c1"]),
        (LocalWork(limit=2, steps=3), ["a0", "a0", "a0", "b0", "b1", "b0", "c0", "c1", "c0"]),
    ],
)
def test_a_limit_counts_batches_of_one_clients_pass(work: LocalWork, expected: list[str], sized: bool) -> None:
    batches, _ = driver(work, sized).run()
    assert [f"{client}{index}" for client, index in batches] == expected


def test_a_share_is_a_share_of_each_clients_pass() -> None:
    batches, _ = driver(LocalWork(limit=0.5), clients="bc").run()
    assert batches == [("b", 0), ("b", 1), ("c", 0)]


def test_the_length_is_told_before_the_last_batch_is_handed_out() -> None:
    rounds = driver(LocalWork(), sized=False, clients="bc")
    lengths = [rounds.plan.num_batches for _ in rounds.loader]
    assert lengths == [None] * 6 + [7]
    assert rounds.events == ["open", "open b", "resolved", "open c", "resolved"]


def test_the_next_round_runs_the_new_plan_with_the_new_work() -> None:
    rounds = driver(LocalWork(), sized=False)
    first, _ = rounds.run()
    rounds.new_round(1)
    assert len(rounds.loader) == UNKNOWN_LENGTH
    assert rounds.run()[0] == first
    rounds.work = LocalWork(steps=1)
    rounds.new_round(2)
    assert rounds.run()[0] == [("a", 0), ("b", 0), ("c", 0)]


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("work", [LocalWork(epochs=2), LocalWork(steps=10)])
def test_samplers_that_order_by_epoch_are_told_of_each_pass(work: LocalWork, batched: bool) -> None:
    sampler = DistributedSampler(range(50), num_replicas=1, rank=0)
    batches_of_ten = {"batch_sampler": BatchSampler(sampler, 10, False)} if batched else {"batch_size": 10}
    loader = DataLoader(range(50), sampler=None if batched else sampler, **batches_of_ten)
    rounds, passes = Driver({"a": loader}, work), []
    for round in range(2):
        rounds.new_round(round)
        batches, _ = rounds.run()
        passes += [torch.cat(batches[:5]).tolist(), torch.cat(batches[5:]).tolist()]
    assert all(sorted(one) == list(range(50)) for one in passes)
    assert all(one != other for one, other in combinations(passes, 2))


def test_a_rank_without_clients_goes_through_the_round_with_one_empty_batch() -> None:
    rounds = Driver({"a": []}, LocalWork())
    assert len(rounds.loader) == 1
    assert rounds.run() == ([None], [])
    assert rounds.events == ["open", None]


@pytest.mark.parametrize(
    ("loader", "work", "message"),
    [
        (WithWrongLength([1, 2]), LocalWork(), r"'a' yielded 2 batches, but its length promised 3.*__len__"),
        (WithoutLength([]), LocalWork(), "'a' has no length and yielded no batch"),
        (WithoutLength([]), LocalWork(steps=2), "'a' yields no batch, but local_steps asks for some"),
        (WithoutLength([1]), LocalWork(limit=0.5), "limit_train_batches=0.5 is a share"),
        (iter([1, 2]), LocalWork(epochs=2), "'a' has no length and yielded no batch"),
        (iter([1, 2]), LocalWork(steps=3), "'a' yields no batch"),
    ],
)
def test_a_loader_that_does_not_keep_its_word_is_refused(loader: Any, work: LocalWork, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Driver({"a": loader}, work).run()
