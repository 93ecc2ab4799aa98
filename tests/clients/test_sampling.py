from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import combinations

import pytest
import torch

from lightning_fl.clients import cohort_size, sample_cohort

NUM_ROUNDS = 4000
Sampler = Callable[[Sequence, int, int, int], list]


@pytest.mark.parametrize(
    ("clients_per_round", "population", "expected"),
    [
        (None, 7, 7),
        (1, 7, 1),
        (7, 7, 7),
        (1.0, 7, 7),
        (0.1, 100, 10),
        (0.1, 3, 1),
        (0.5, 7, 4),
        (1e-9, 7, 1),
    ],
)
def test_a_count_a_share_or_all(clients_per_round: int | float | None, population: int, expected: int) -> None:
    assert cohort_size(clients_per_round, population) == expected


@pytest.mark.parametrize(
    ("clients_per_round", "message"),
    [
        (0, "must be at least 1"),
        (-1, "must be at least 1"),
        (8, "more than the federation's 7 clients"),
        (0.0, r"must lie in \(0, 1\]"),
        (1.5, r"must lie in \(0, 1\]"),
        (float("nan"), r"must lie in \(0, 1\]"),
        (True, "neither a count"),
        ("all", "neither a count"),
    ],
)
def test_what_is_out_of_range_is_refused(clients_per_round: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cohort_size(clients_per_round, 7)


@pytest.mark.parametrize("population", [1, 10, 20_000])
def test_a_cohort_holds_each_client_once_in_the_order_of_all(population: int) -> None:
    clients = [f"client {index}" for index in range(population)]
    position = {client: index for index, client in enumerate(clients)}
    for round in range(20):
        cohort = sample_cohort(clients, max(1, population // 2), seed=0, round=round)
        positions = [position[client] for client in cohort]
        assert len(positions) == max(1, population // 2)
        assert positions == sorted(set(positions))


def test_all_clients_are_all_clients() -> None:
    assert sample_cohort(["b", "a"], 2, seed=0, round=0) == ["b", "a"]


def test_the_same_seed_and_round_draw_the_same_cohort_and_others_draw_others() -> None:
    def cohorts(seed: int) -> list[list[int]]:
        return [sample_cohort(range(100), 10, seed, round) for round in range(5)]

    assert cohorts(1) == cohorts(1)
    assert not any(own == other for own, other in zip(cohorts(1), cohorts(2), strict=True))
    assert len({tuple(cohort) for cohort in cohorts(1)}) == 5


def test_a_cohort_leaves_the_global_generators_alone() -> None:
    before = torch.get_rng_state()
    sample_cohort(range(100), 10, seed=0, round=0)
    assert torch.equal(torch.get_rng_state(), before)


def chi_square_p(observed: Sequence[int], expected: float, inflation: float = 1.0) -> float:
    """The probability of counts at least this uneven if all are equally likely."""
    statistic = inflation * sum((count - expected) ** 2 / expected for count in observed)
    degrees = torch.tensor((len(observed) - 1) / 2, dtype=torch.float64)
    return torch.special.gammaincc(degrees, torch.tensor(statistic / 2, dtype=torch.float64)).item()


def p_of_clients(sample: Sampler, population: int, size: int) -> float:
    """Every client is equally likely; without replacement the counts spread less, by (n - m) / (n - 1)."""
    counts = Counter(client for round in range(NUM_ROUNDS) for client in sample(range(population), size, 0, round))
    inflation = (population - 1) / (population - size)
    return chi_square_p([counts[client] for client in range(population)], NUM_ROUNDS * size / population, inflation)


def p_of_subsets(sample: Sampler, population: int, size: int) -> float:
    """Every subset is equally likely."""
    counts = Counter(tuple(sample(range(population), size, 0, round)) for round in range(NUM_ROUNDS))
    subsets = list(combinations(range(population), size))
    assert counts.keys() <= set(subsets)
    return chi_square_p([counts[subset] for subset in subsets], NUM_ROUNDS / len(subsets))


def favour_the_first(clients: Sequence, size: int, seed: int, round: int) -> list:
    return list(clients[:size]) if round % 20 == 0 else sample_cohort(clients, size, seed, round)


def take_turns(clients: Sequence, size: int, seed: int, round: int) -> list:
    return sorted({clients[(round + offset) % len(clients)] for offset in range(size)})


def test_clients_and_subsets_are_equally_likely() -> None:
    assert p_of_clients(sample_cohort, population=20, size=5) > 1e-4
    assert p_of_subsets(sample_cohort, population=6, size=3) > 1e-4


def test_an_uneven_sampler_is_caught() -> None:
    assert p_of_clients(favour_the_first, population=20, size=5) < 1e-4
    assert p_of_subsets(take_turns, population=6, size=3) < 1e-4


def test_the_chi_square_is_right() -> None:
    assert chi_square_p([10, 20, 30], 20.0) == pytest.approx(0.006737946999085467)  # exp(-5), two degrees of freedom
