"""The simulated clock by itself: who is taken in when, and from which version."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from lightning_fl.clients import (
    FixedDurations,
    Lognormal,
    Measured,
    Participation,
    ParticipationSampler,
    Population,
)
from lightning_fl.communication import LocalGroup
from lightning_fl.datamodules import ClientLoaders
from lightning_fl.schedules import (
    Buffered,
    Clients,
    Clock,
    Compass,
    Deadline,
    Fastest,
    FedAsync,
    Flush,
    Hinge,
    Polynomial,
    RoundSchedule,
    Synchronous,
)

Q3 = {0: 1.5, 1: 2.25, 2: 4.0}


def clients(durations: Any, cohort: Sequence[int] | None = None, seed: int = 0) -> Clients:
    durations = FixedDurations(durations) if isinstance(durations, Mapping) else durations
    population = Population(ClientLoaders({i: [] for i in range(len(getattr(durations, "durations", range(50))))}))
    return Clients(population, durations, lambda index: population.ids if cohort is None else cohort, seed)


def run(schedule: RoundSchedule, who: Clients, rounds: int, clock: Clock | None = None) -> tuple[list[Flush], Clock]:
    flushes, clock = [], clock or Clock()
    for _ in range(rounds):
        flush, clock = schedule.next(clock, who)
        flushes.append(flush)
    return flushes, clock


def told(flushes: Sequence[Flush]) -> list[tuple[float, list[tuple[Any, int]]]]:
    return [(flush.seconds, [(visit.client, visit.version) for visit in flush.visits]) for flush in flushes]


def test_a_round_takes_in_the_next_two_from_the_versions_they_started_from() -> None:
    assert told(run(Buffered(2), clients(Q3), 5)[0]) == [
        (2.25, [(0, 0), (1, 0)]),
        (4.0, [(0, 0), (2, 0)]),  # client 0 had started again at 1.5 s, before the first round closed
        (4.5, [(0, 1), (1, 1)]),
        (6.75, [(0, 3), (1, 3)]),
        (8.0, [(0, 3), (2, 2)]),
    ]


def test_all_of_one_instant_are_taken_in_before_anybody_starts_again() -> None:
    """Three rounds of one update close at one instant; whoever starts then starts from the last of their models."""
    flushes, _ = run(Buffered(1), clients({2: 1, 0: 1, 1: 1}), 6)
    first = [(1.0, [(client, 0)]) for client in range(3)]
    assert told(flushes) == [*first, *[(2.0, [(client, 3)]) for client in range(3)]]


def test_what_does_not_fit_into_a_round_waits_for_the_next() -> None:
    flushes, clock = run(Buffered(2), clients({0: 1, 1: 1, 2: 1}), 3)
    assert told(flushes) == [(1.0, [(0, 0), (1, 0)]), (2.0, [(2, 0), (0, 1)]), (2.0, [(1, 1), (2, 1)])]
    assert not clock.versions


def test_a_fast_client_comes_several_times_in_a_round() -> None:
    (flush,), _ = run(Buffered(7), clients({0: 1, 1: 2, 2: 4}), 1)
    assert [(visit.client, visit.number) for visit in flush.visits] == [
        (0, 0), (0, 1), (1, 0), (0, 2), (0, 3), (1, 1), (2, 0)
    ]  # fmt: skip
    assert (flush.seconds, flush.staleness(0)) == (4.0, [7])


def test_the_clock_counts_nanoseconds() -> None:
    """Ten times a tenth of a second is the instant of one second, which it is not in floats."""
    flushes, _ = run(Buffered(11), clients({0: 0.1, 1: 1}), 1)
    assert sum([0.1] * 10) != 1.0
    assert flushes[0].seconds == 1.0


def test_only_so_many_train_at_the_same_time_and_nobody_twice() -> None:
    who, clock, started = clients(Lognormal(sigma=1.5, visit_sigma=0.5)), Clock(), []
    for _ in range(200):
        flush, clock = Buffered(3, concurrency=10).next(clock, who)
        busy = [job.client for job in clock.training]
        assert len(busy) == len(set(busy)) <= 10
        assert all(job.arrival > clock.time for job in clock.training)
        started += [visit.client for visit in flush.visits]
    assert len(set(started)) == 50  # everybody has its turn


def test_the_first_draws_are_those_of_uniform_cohorts() -> None:
    who = clients(dict.fromkeys(range(50), 1), seed=7)
    sampler = ParticipationSampler(Participation(clients_per_round=10), who.population, 7, LocalGroup())
    flushes, _ = run(Buffered(10, concurrency=10), who, 4)
    assert [[visit.client for visit in flush.visits] for flush in flushes] == [sampler.cohort(i) for i in range(4)]


def test_a_clock_goes_through_json_and_goes_on_as_before() -> None:
    schedule, who = Buffered(3, concurrency=10), clients(Lognormal(visit_sigma=1))
    flushes, _ = run(schedule, who, 20)
    _, clock = run(schedule, who, 9)
    again = Clock.from_state(json.loads(json.dumps(clock.to_state())))
    assert again == clock
    assert run(schedule, who, 11, again)[0] == flushes[9:]


def test_synchronous_rounds_wait_for_the_slowest() -> None:
    assert told(run(Synchronous(), clients(Q3, [0, 1]), 2)[0]) == [(2.25, [(0, 0), (1, 0)]), (4.5, [(0, 1), (1, 1)])]


def test_deadlines() -> None:
    partial, drop = (run(Deadline(3, late), clients(Q3), 1)[0][0] for late in ("partial", "drop"))
    assert [visit.part for visit in partial.visits] == [1, 1, 0.75]
    assert [visit.client for visit in drop.visits] == [0, 1]
    assert (drop.dropped, drop.seconds, partial.seconds) == ([2], 3.0, 3.0)
    assert run(Deadline(30), clients(Q3), 1)[0][0].seconds == 4.0  # nobody waits for a deadline when all are back


def test_the_fastest_are_taken_in_by_order_if_they_are_equally_fast() -> None:
    flush, _ = Fastest(2, of=4).next(Clock(), clients({0: 3, 1: 2, 2: 1, 3: 2}))
    assert [visit.client for visit in flush.visits] == [1, 2]
    assert (flush.dropped, flush.seconds) == ([0, 3], 2.0)


def test_slow_clients_get_fewer_steps_to_return_with_the_others() -> None:
    """1, 2, 5 and 10 s a step: the last can't return at 100 s with 20 steps, so the others join it at 200 s."""
    flushes, clock = run(Compass(20, 100), clients({0: 100, 1: 200, 2: 500, 3: 1000}), 3)
    assert [
        [(visit.client, visit.version, round(100 * visit.part)) for visit in flush.visits] for flush in flushes
    ] == [
        [(0, 0, 100), (1, 0, 50), (2, 0, 20)],
        [(0, 1, 100), (1, 1, 50), (2, 1, 20), (3, 0, 20)],
        [(0, 2, 100), (1, 2, 50), (2, 2, 20)],
    ]
    assert [flush.seconds for flush in flushes] == [100.0, 200.0, 300.0]
    assert [job.client for job in clock.training] == [3]


def test_measured_clients_take_what_they_took() -> None:
    durations = Measured(first=3)
    assert [durations.seconds(0, 0, 0, {}), durations.seconds(0, 0, 0, {1: 2.0, 2: 4.0})] == [3, 3]
    assert durations.seconds(1, 0, 0, {1: 2.0, 2: 4.0}) == 2


def test_few_are_slow() -> None:
    """Quantiles of the lognormal distribution: half above the median, 2.3% above exp(2) times it."""
    durations = Lognormal(median=20)
    seconds = sorted(durations.seconds(client, 0, 0, {}) for client in range(4000))
    assert seconds[2000] == pytest.approx(20, rel=0.08)
    assert seconds[int(4000 * 0.97725)] == pytest.approx(20 * 7.389, rel=0.15)


def test_what_stale_updates_weigh() -> None:
    assert [Polynomial(0.5)(tau) for tau in (0, 3)] == [1, 0.5]
    assert [Hinge(10, 4)(tau) for tau in (0, 4, 5)] == [1, 1, 1 / 11]


@dataclass(frozen=True)
class Wrong(Lognormal):
    def seconds(self, *args: Any) -> float:
        return 0.0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: Buffered(0), "at least 1"),
        (lambda: Buffered(1, concurrency=51).check(50), "Lower concurrency"),
        (lambda: FedAsync(1.5), "a share in"),
        (lambda: Compass(3, 2), "min_steps <= max_steps"),
        (lambda: Compass(2, 5).check_work(None), r"Set FederatedStrategy\(local_steps=5\)"),
        (lambda: Deadline(0), "positive"),
        (lambda: Deadline(1, "later"), "'drop' or 'partial'"),
        (lambda: Fastest(3, of=2), "k <= of"),
        (lambda: Polynomial(-1), "at least 0"),
        (lambda: Hinge(-1), "at least 0"),
        (lambda: Lognormal(0), "positive median"),
        (lambda: FixedDurations({0: -1}), "positive seconds"),
        (lambda: FixedDurations({0: 1}).check(clients(Q3).population), "does not name client 1"),
        (lambda: FixedDurations({7: 1}).check(clients(Q3).population), "client 7, which is not"),
        (lambda: Buffered(1).next(Clock(), clients(Wrong())), "expected a positive number"),
    ],
)
def test_impossible_settings_are_refused(wrong: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrong()


def test_a_visit_that_is_too_old_is_left_out() -> None:
    """Client 2 takes ten times as long: its first visit is nine versions old when it is back."""
    durations = {0: 1, 1: 1, 2: 10}
    limited, _ = run(Buffered(2, max_staleness=3), clients(durations), 20)
    anyhow, _ = run(Buffered(2), clients(durations), 20)
    assert max(index - visit.version for index, flush in enumerate(anyhow) for visit in flush.visits) > 3
    assert max(index - visit.version for index, flush in enumerate(limited) for visit in flush.visits) <= 3
    assert {client for flush in limited for client in flush.dropped} == {2}
    assert not any(flush.dropped for flush in anyhow)
    with pytest.raises(ValueError, match="max_staleness of at least 0"):
        Buffered(2, max_staleness=-1)
