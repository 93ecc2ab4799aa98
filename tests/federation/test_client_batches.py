"""A client's batches in a round, and where each of them stands in the client's local work."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler

from lightning_fl.clients.local_work import BatchPosition, LocalWork
from lightning_fl.federation import ClientBatches, LoaderFailed
from lightning_fl.federation.client_batches import raise_to_user

limits = st.integers(1, 5) | st.floats(0.2, 1.0)
parts = st.just(1.0) | st.floats(0.0, 1.0, exclude_min=True)
works = st.builds(LocalWork, st.integers(1, 3), st.none() | st.integers(1, 6), st.integers(1, 4), limits, parts)


class WithoutLength:
    """Yields the batches of another loader, and can't tell how many."""

    def __init__(self, batches: Sequence[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


class WithWrongLength(WithoutLength):
    def __len__(self) -> int:
        return len(self.batches) + 1


def read(loader: Any, *works: LocalWork, round: int = 0, **options: Any) -> tuple[list[Any], list[BatchPosition]]:
    batches = ClientBatches("a", loader, works, round, works[0])
    pairs = list(batches.read(**options))
    return [batch for batch, _ in pairs], [position for _, position in pairs]


class CountsPasses(DistributedSampler[int]):
    """Remembers which pass numbers it was told."""

    def __init__(self) -> None:
        super().__init__(range(4), num_replicas=1, rank=0)
        self.told: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        self.told.append(epoch)


def test_pass_numbers_never_repeat_with_several_phases_and_uneven_work() -> None:
    sampler = CountsPasses()
    loader = DataLoader(range(4), sampler=sampler)
    for round, epochs in enumerate((5, 3, 2, 5)):
        works = [LocalWork(epochs), LocalWork(1)]
        list(ClientBatches("a", loader, works, round, LocalWork(5)).read())
    assert len(set(sampler.told)) == len(sampler.told) == 19


def windows(segments: Sequence[int], accumulate: int) -> list[list[int]]:
    """The accumulation windows of a client, each the offsets of its batches."""
    found, offset = [], 0
    for length in segments:
        own = range(offset, offset + length)
        found += [list(own[start : start + accumulate]) for start in range(0, length, accumulate)]
        offset += length
    return found


@pytest.mark.parametrize("sized", [True, False])
@given(epochs=st.integers(1, 3), length=st.integers(1, 7), accumulate=st.integers(1, 4))
def test_every_batch_is_where_the_enumeration_puts_it(sized: bool, epochs: int, length: int, accumulate: int) -> None:
    own = list(range(length))
    batches, positions = read(own if sized else WithoutLength(own), LocalWork(epochs, accumulate=accumulate))
    assert batches == own * epochs
    expected = [
        BatchPosition(
            offset % length,
            starts_window=offset == window[0],
            ends_window=offset == window[-1],
            window=accumulate,
            ends_pass=(offset + 1) % length == 0,
            ends_phase=offset + 1 == epochs * length,
            is_last=offset + 1 == epochs * length,
            ends_epoch=(offset + 1) % length == 0,
            epoch_length=length if sized else None,
        )
        for window in windows([length] * epochs, accumulate)
        for offset in window
    ]
    assert positions == expected


def test_passes_taken_as_one_would_straddle_windows() -> None:
    apart, as_one = (read(range(n), LocalWork(epochs=6 // n, accumulate=2))[1] for n in (3, 6))
    assert [position.ends_window for position in apart] == [False, True, True, False, True, True]
    assert [position.ends_window for position in as_one] == [False, True, False, True, False, True]


@given(works, st.integers(1, 7))
def test_the_optimizer_steps_as_often_as_the_work_says(work: LocalWork, length: int) -> None:
    assume(not isinstance(work.limit, float) or int(length * work.limit))
    _, positions = read(range(length), work)
    steps = sum(position.ends_window for position in positions)
    whole = replace(work, part=1.0).num_steps(length)
    assert whole is not None
    assert steps == work.num_steps(length) == max(1, math.ceil(work.part * whole))
    assert work.steps is None or whole == work.steps


@pytest.mark.parametrize("sized", [True, False])
@pytest.mark.parametrize(("steps", "accumulate"), [(1, 1), (10, 1), (3, 2)])
def test_local_steps_are_taken_exactly_whatever_the_loader(steps: int, accumulate: int, sized: bool) -> None:
    own = list(range(3))
    batches, positions = read(own if sized else WithoutLength(own), LocalWork(steps=steps, accumulate=accumulate))
    assert batches == (own * 10)[: steps * accumulate]
    assert sum(position.ends_window for position in positions) == steps


def test_local_steps_count_batches_pass_by_pass() -> None:
    _, positions = read(range(3), LocalWork(steps=7))
    assert [position.offset for position in positions] == [0, 1, 2, 0, 1, 2, 0]
    assert [position.epoch_length for position in positions] == [3, 3, 3, 3, 3, 3, 1]
    assert [position.ends_epoch for position in positions] == [False, False, True, False, False, True, True]
    _, straggler = read(range(4), LocalWork(2, part=0.75))
    assert [(position.offset, position.epoch_length) for position in straggler] == [
        *((0, 4), (1, 4), (2, 4), (3, 4)),
        *((0, 2), (1, 2)),
    ]
    _, unsized = read(WithoutLength(list(range(3))), LocalWork(steps=4))
    assert [position.ends_epoch for position in unsized] == [False, False, False, True]


def test_local_steps_see_a_fresh_order_at_each_pass() -> None:
    loader = DataLoader(range(50), batch_size=10, shuffle=True, generator=torch.Generator().manual_seed(0))
    batches, _ = read(loader, LocalWork(steps=10))
    first, second = torch.cat(batches[:5]).tolist(), torch.cat(batches[5:]).tolist()
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second


@pytest.mark.parametrize("sized", [True, False])
@pytest.mark.parametrize(
    ("work", "expected"),
    [
        (LocalWork(limit=2), [0, 1]),
        (LocalWork(limit=2, epochs=2), [0, 1, 0, 1]),
        (LocalWork(limit=2, steps=3), [0, 1, 0]),
    ],
)
def test_a_limit_counts_batches_of_one_pass(work: LocalWork, expected: list[int], sized: bool) -> None:
    own = list(range(4))
    assert read(own if sized else WithoutLength(own), work)[0] == expected


def test_a_share_is_a_share_of_a_pass() -> None:
    assert read(range(4), LocalWork(limit=0.5))[0] == [0, 1]
    assert read(range(3), LocalWork(limit=0.5))[0] == [0]


def test_phases_follow_each_other_and_are_announced_between_their_batches() -> None:
    events: list[Any] = []
    batches = ClientBatches("a", range(2), [LocalWork(2), LocalWork(steps=1)], 0, LocalWork(2))
    for batch, position in batches.read(next_phase=lambda: events.append("next")):
        events.append((batch, position.offset, position.ends_phase, position.is_last))
    assert events == [
        *((0, 0, False, False), (1, 1, False, False), (0, 0, False, False), (1, 1, True, False)),
        "next",
        (0, 0, True, True),
    ]


def test_nothing_is_read_before_it_is_asked_for_and_the_first_batch_is_announced() -> None:
    read_so_far: list[int] = []

    def loader() -> Iterator[int]:
        for index in range(3):
            read_so_far.append(index)
            yield index

    first: list[list[int]] = []
    batches = ClientBatches(
        "a", loader(), [LocalWork(limit=3)], 0, LocalWork(), on_first_batch=lambda: first.append(list(read_so_far))
    ).read()
    assert read_so_far == []
    next(batches)
    assert first == [[0, 1]]  # one ahead, since the loader can't tell which is its last


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("work", [LocalWork(epochs=2), LocalWork(steps=10)])
def test_samplers_that_order_by_epoch_are_told_of_each_pass(work: LocalWork, batched: bool) -> None:
    sampler = DistributedSampler(range(50), num_replicas=1, rank=0)
    batches_of_ten = {"batch_sampler": BatchSampler(sampler, 10, False)} if batched else {"batch_size": 10}
    loader = DataLoader(range(50), sampler=None if batched else sampler, **batches_of_ten)
    passes = []
    for round in range(2):
        batches, _ = read(loader, work, round=round)
        passes += [torch.cat(batches[:5]).tolist(), torch.cat(batches[5:]).tolist()]
    assert all(sorted(one) == list(range(50)) for one in passes)
    assert all(one != other for one, other in combinations(passes, 2))


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
    with pytest.raises(LoaderFailed) as failed:
        read(loader, work)
    with pytest.raises(ValueError, match=message):
        raise_to_user(failed.value)


def test_an_error_in_a_loader_names_the_client_and_the_remedy() -> None:
    def broken() -> Iterator[int]:
        yield 1
        raise OSError("disk gone")

    with pytest.raises(LoaderFailed) as failed:
        read(broken(), LocalWork(limit=2))
    with pytest.raises(ValueError, match=r"client 'a' raised OSError: disk gone.*on_client_error='skip'"):
        raise_to_user(failed.value)


def test_a_pass_of_its_own_leaves_the_training_as_it_is() -> None:
    batches = ClientBatches("a", range(3), [LocalWork(limit=2)], 0, LocalWork(limit=2))
    assert list(batches.read_once()) == [0, 1]
    assert [batch for batch, _ in batches.read()] == [0, 1]
    with pytest.raises(LoaderFailed, match="can be read once only"):
        list(ClientBatches("a", iter([1]), [LocalWork()], 0, LocalWork()).read_once())
    with pytest.raises(LoaderFailed, match="may never end"):
        list(ClientBatches("a", WithoutLength([1]), [LocalWork(steps=2)], 0, LocalWork(steps=2)).read_once())
