from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from lightning_fl.federation.plan import BatchPosition, RoundPlan

from lightning_fl.clients.local_work import LocalWork

segments_of_clients = st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=3), min_size=1, max_size=4)
accumulations = st.integers(1, 4)
limits = st.integers(1, 5) | st.floats(0.2, 1.0)
parts = st.just(1.0) | st.floats(0.0, 1.0, exclude_min=True)
works = st.builds(LocalWork, st.integers(1, 3), st.none() | st.integers(1, 6), accumulations, limits, parts)


def enumerate_windows(segments: Sequence[Sequence[int]], accumulate: int) -> list[list[tuple[int, int]]]:
    """The windows of a round, each a list of ``(client, index among the client's batches)``."""
    windows = []
    for client, lengths in enumerate(segments):
        offset = 0
        for length in lengths:
            batches = [(client, offset + index) for index in range(length)]
            windows += [batches[start : start + accumulate] for start in range(0, length, accumulate)]
            offset += length
    return windows


def enumerate_places(segments: Sequence[Sequence[int]], accumulate: int) -> list[BatchPosition]:
    windows = enumerate_windows(segments, accumulate)
    last_of_client = {client: offset for window in windows for client, offset in window}
    places = [
        BatchPosition(
            client=client,
            starts_window=(client, offset) == window[0],
            ends_window=(client, offset) == window[-1],
            ends_client=offset == last_of_client[client],
            ends_round=False,
            offset=offset,
        )
        for window in windows
        for client, offset in window
    ]
    return [*places[:-1], replace(places[-1], ends_round=True)]


def plan_of(segments: Sequence[Sequence[int | None]], accumulate: int = 1) -> RoundPlan:
    return RoundPlan(0, range(len(segments)), range(len(segments)), segments, accumulate)


def located(plan: RoundPlan, num_batches: int) -> list[BatchPosition]:
    return [plan.locate(index) for index in range(num_batches)]


@given(segments_of_clients, accumulations)
def test_every_batch_is_where_the_enumeration_puts_it(segments: list[list[int]], accumulate: int) -> None:
    plan, expected = plan_of(segments, accumulate), enumerate_places(segments, accumulate)
    assert plan.num_batches == len(expected)
    assert located(plan, len(expected)) == expected


@given(segments_of_clients, accumulations, st.data())
def test_lengths_may_show_only_before_the_last_batch(
    segments: list[list[int]], accumulate: int, data: st.DataObject
) -> None:
    expected = enumerate_places(segments, accumulate)
    known = [[data.draw(st.booleans()) for _ in lengths] for lengths in segments]
    hidden = [
        [n if told else None for n, told in zip(*pair, strict=True)] for pair in zip(segments, known, strict=True)
    ]
    plan, places = plan_of(hidden, accumulate), []
    for lengths, tolds in zip(segments, known, strict=True):
        for length, told in zip(lengths, tolds, strict=True):
            for index in range(length):
                if index + 1 == length and not told:
                    assert plan.num_batches is None
                    plan.resolve(length)
                places.append(plan.locate(len(places)))
    assert places == expected
    assert plan.num_batches == len(expected)


@given(segments_of_clients, accumulations)
def test_windows_never_straddle_clients_or_passes(segments: list[list[int]], accumulate: int) -> None:
    passes = [
        (client, index) for client, lengths in enumerate(segments) for index, n in enumerate(lengths) for _ in range(n)
    ]
    window: list[tuple[int, int]] = []
    for place, own in zip(located(plan_of(segments, accumulate), len(passes)), passes, strict=True):
        assert place.starts_window == (not window)
        window.append(own)
        if place.ends_window:
            assert len(set(window)) == 1
            assert len(window) <= accumulate
            window = []
    assert not window


def test_passes_taken_as_one_would_straddle() -> None:
    apart, as_one = (located(plan_of([lengths], accumulate=2), 6) for lengths in ([3, 3], [6]))
    assert [place.ends_window for place in apart] == [False, True, True, False, True, True]
    assert [place.ends_window for place in as_one] == [False, True, False, True, False, True]


@given(works, st.lists(st.integers(0, 7), min_size=1, max_size=4))
def test_the_optimizer_steps_as_often_as_the_work_says(work: LocalWork, lengths: list[int]) -> None:
    assume(not isinstance(work.limit, float) or all(int(length * work.limit) or not length for length in lengths))
    segments = [segments for length in lengths if (segments := work.segments(length))]
    assume(segments)
    plan = plan_of(segments, work.accumulate)
    places = located(plan, plan.num_batches or 0)
    for client, length in enumerate(length for length in lengths if work.segments(length)):
        steps = sum(place.ends_window for place in places if place.client == client)
        assert steps == work.num_steps(length)
        whole = replace(work, part=1.0).num_steps(length)
        assert whole is not None
        assert steps == max(1, math.ceil(work.part * whole))
        assert work.steps is None or whole == work.steps


def test_a_rank_without_clients_has_one_empty_batch() -> None:
    plan = RoundPlan(3, ["a", "b"], [], [])
    assert (plan.num_batches, plan.clients, plan.cohort, plan.round) == (1, [], ["a", "b"], 3)


@pytest.mark.parametrize(
    ("limit", "num_batches", "expected"),
    [
        (1.0, 7, 7),
        (0.5, 7, 3),
        (0.99, 100, 99),
        (1.0, 0, 0),
        (0.5, 0, 0),
        (3, 7, 3),
        (7, 3, 3),
        (1, 7, 1),
        (0, 7, 0),
        (1.0, None, None),
        (3, None, None),
    ],
)
def test_a_pass_is_limited_by_a_count_or_a_share(
    limit: int | float, num_batches: int | None, expected: int | None
) -> None:
    assert LocalWork(limit=limit).pass_length(num_batches) == expected


@pytest.mark.parametrize(
    ("limit", "num_batches", "message"),
    [
        (0.1, 7, "leaves none of the client's 7 batches"),
        (0.5, None, "is a share, but the client's loader has no length"),
    ],
)
def test_a_share_that_leaves_nothing_or_of_nothing_known_is_refused(
    limit: float, num_batches: int | None, message: str
) -> None:
    with pytest.raises(ValueError, match=f"limit_train_batches={limit} {message}"):
        LocalWork(limit=limit).segments(num_batches)


@pytest.mark.parametrize(
    ("work", "num_batches", "segments", "num_steps"),
    [
        (LocalWork(), 5, [5], 5),
        (LocalWork(epochs=2), 5, [5, 5], 10),
        (LocalWork(epochs=2, accumulate=2), 5, [5, 5], 6),
        (LocalWork(epochs=2, accumulate=2, limit=4), 5, [4, 4], 4),
        (LocalWork(epochs=2), 0, [], 0),
        (LocalWork(epochs=2), None, [None, None], None),
        (LocalWork(steps=7), 5, [7], 7),
        (LocalWork(steps=7, accumulate=3), 5, [21], 7),
        (LocalWork(steps=7, accumulate=3), None, [21], 7),
        (LocalWork(steps=7), 0, [], 0),
        (LocalWork(epochs=2, part=0.1), 5, [1], 1),
        (LocalWork(epochs=2, part=0.5), 5, [5], 5),
        (LocalWork(epochs=2, part=0.51), 5, [5, 1], 6),
        (LocalWork(epochs=2, accumulate=2, part=0.9), 5, [5, 5], 6),
        (LocalWork(epochs=2, accumulate=2, part=0.7), 5, [5, 4], 5),
        (LocalWork(epochs=4, part=0.6), None, [None, None, None], None),
        (LocalWork(steps=7, accumulate=3, part=0.5), 5, [12], 4),
        (LocalWork(epochs=2, part=0.5), 0, [], 0),
    ],
)
def test_the_work_is_passes_or_exactly_so_many_steps(
    work: LocalWork, num_batches: int | None, segments: list[int | None], num_steps: int | None
) -> None:
    assert work.segments(num_batches) == segments
    assert work.num_steps(num_batches) == num_steps
