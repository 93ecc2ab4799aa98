from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch

from lightning_fl.clients import (
    Cohort,
    Participation,
    ParticipationSampler,
    Poisson,
    Population,
    RoundRobin,
    Sampling,
    Uniform,
    Weighted,
    cohort_size,
)
from lightning_fl.communication import LocalGroup
from lightning_fl.data.client_loaders import ClientLoaders

NUM_ROUNDS = 4000
Sampler = Callable[[Sequence, int, int, int], list]


def draws(
    cohort: Cohort, clients: Any, clients_per_round: int | float | None = None, seed: int = 0
) -> ParticipationSampler:
    population = Population(ClientLoaders(clients, lambda client: [], num_examples=lambda client: 1 + client))
    return ParticipationSampler(Participation(cohort, clients_per_round), population, seed, LocalGroup())


def sample_cohort(clients: Sequence, size: int, seed: int, round: int) -> list:
    return draws(Uniform(), clients, size, seed).cohort(round)


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
    clients = [f"client {index:05}" for index in range(population)]
    position = {client: index for index, client in enumerate(clients)}
    for round in range(20):
        cohort = sample_cohort(clients, max(1, population // 2), seed=0, round=round)
        positions = [position[client] for client in cohort]
        assert len(positions) == max(1, population // 2)
        assert positions == sorted(set(positions))


def test_all_clients_are_all_clients() -> None:
    assert sample_cohort(["b", "a"], 2, seed=0, round=0) == ["a", "b"]


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


def taken(
    cohort: Cohort, population: int, clients_per_round: int | None = None, rounds: int = NUM_ROUNDS
) -> np.ndarray:
    """Which client took part in which round: 0 and 1, ``[rounds, population]``."""
    drawn, took_part = draws(cohort, range(population), clients_per_round), np.zeros((rounds, population))
    for round in range(rounds):
        took_part[round, drawn.cohort(round)] = 1
    return took_part


def worst_z(took_part: np.ndarray, probabilities: np.ndarray) -> float:
    """The largest deviation of the clients' counts, in standard deviations of a binomial."""
    rounds, certain = len(took_part), (probabilities == 0) | (probabilities == 1)
    counts = took_part.sum(axis=0)
    assert np.array_equal(counts[certain], rounds * probabilities[certain])
    counts, p = counts[~certain], probabilities[~certain]
    return float(np.abs((counts - rounds * p) / np.sqrt(rounds * p * (1 - p))).max(initial=0))


def worst_pair_z(took_part: np.ndarray, rate: float) -> float:
    """The largest deviation of the counts of pairs from those of independent clients."""
    rounds, p = len(took_part), rate**2
    pairs = (took_part.T @ took_part)[np.triu_indices(took_part.shape[1], k=1)]
    return float(np.abs((pairs - rounds * p) / np.sqrt(rounds * p * (1 - p))).max())


def z_of_variance(sizes: np.ndarray, expected: float) -> float:
    """The deviation of the variance of the cohorts' sizes, in its standard errors."""
    return float((sizes.var(ddof=1) / expected - 1) / np.sqrt(2 / (len(sizes) - 1)))


@pytest.mark.parametrize("secure", [False, True])
@pytest.mark.parametrize(("population", "rate"), [(20, 0.3), (40, 0.05), (5, 0.9)])
@pytest.mark.spread(2)
def test_poisson_takes_each_client_on_its_own(population: int, rate: float, secure: bool) -> None:
    took_part = taken(Poisson(rate, secure=secure), population)
    sizes, mean, limit = took_part.sum(axis=1), population * rate, 5.5 if secure else 4.0
    assert abs(sizes.mean() - mean) < limit * np.sqrt(mean * (1 - rate) / NUM_ROUNDS)
    assert abs(z_of_variance(sizes, mean * (1 - rate))) < limit + 1
    assert worst_z(took_part, np.full(population, rate)) < limit
    assert worst_pair_z(took_part, rate) < limit + 1


@dataclass(frozen=True)
class PoissonByPairs(Poisson):
    """Right in each client's probability, but neighbours take part together."""

    def draw(self, sampling: Sampling, round: int, rng: Any, prepared: Any) -> np.ndarray:
        return np.flatnonzero(np.repeat(rng.random(sampling.num_clients // 2) < self.rate, 2))


def test_what_is_not_poisson_is_caught() -> None:
    fixed = taken(Uniform(), 20, 6)
    assert abs(z_of_variance(fixed.sum(axis=1), 20 * 0.3 * 0.7)) > 20
    assert worst_z(taken(Poisson(0.33), 20), np.full(20, 0.3)) > 4
    by_pairs = taken(PoissonByPairs(0.3), 20)
    assert worst_z(by_pairs, np.full(20, 0.3)) < 4
    assert worst_pair_z(by_pairs, 0.3) > 20


def test_poisson_of_all_is_all_and_of_few_may_be_nobody() -> None:
    assert draws(Poisson(1.0), range(7)).cohort(3) == list(range(7))
    assert not any(draws(Poisson(1e-12), range(1000)).cohort(round) for round in range(20))


def test_secure_uniform_cohorts_are_uniform_too() -> None:
    took_part = taken(Uniform(secure=True), 20, 5)
    assert set(took_part.sum(axis=1)) == {5}
    assert worst_z(took_part, np.full(20, 0.25)) < 5.5


@pytest.mark.parametrize("cohort", [Uniform(secure=True), Poisson(0.1, secure=True)], ids=repr)
def test_secure_cohorts_do_not_repeat_but_stay_what_they_are_within_a_round(cohort: Cohort) -> None:
    size = 100 if isinstance(cohort, Uniform) else None
    one, other = draws(cohort, range(1000), size), draws(cohort, range(1000), size)
    assert one.is_secure
    assert one.cohort(0) == one.cohort(0) != other.cohort(0)
    assert one.cohort(0) != one.cohort(1)


def test_nothing_is_secure_where_nothing_is_drawn() -> None:
    population = Population(ClientLoaders(range(5), lambda client: []))
    assert not ParticipationSampler(Participation(secure=True), population, 0, LocalGroup()).is_secure


WEIGHTS = {
    "few of many": ([1.0] * 150 + [7.0] * 50, 3),
    "many of few": ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 6.0], 4),
    "one is always in": ([1.0, 1.0, 1.0, 100.0, 2.0], 3),
    "two are never in": ([0.0, 1.0, 2.0, 3.0, 0.0, 2.0], 2),
    "as many as there are": ([3.0, 0.0, 1.0], 2),
}


def probabilities(weights: Sequence[float], size: int) -> np.ndarray:
    """``min(1, c w)`` with the ``c`` that makes them add up to ``size``, by bisection."""
    w, low, high = np.array(weights), 0.0, 1e6
    for _ in range(200):
        c = (low + high) / 2
        low, high = (c, high) if np.minimum(1, c * w).sum() < size else (low, c)
    return np.where(np.minimum(1, c * w) > 1 - 1e-9, 1.0, c * w)


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.spread(2)
def test_weighted_clients_take_part_in_proportion_to_their_weights(name: str) -> None:
    weights, size = WEIGHTS[name]
    cohort = Weighted(dict(enumerate(weights)))
    took_part = taken(cohort, len(weights), size)
    assert set(took_part.sum(axis=1)) == {size}
    assert worst_z(took_part, probabilities(weights, size)) < 4.2
    drawn = draws(cohort, range(len(weights)), size)
    assert drawn._prepared.few_collide == (name in ("few of many", "two are never in"))


@dataclass(frozen=True)
class OneAfterTheOther(Cohort):
    """Weighted draws without replacement, one after the other: large clients take part too seldom."""

    weights: tuple[float, ...] = ()

    def draw(self, sampling: Sampling, round: int, rng: Any, prepared: Any) -> np.ndarray:
        p = np.array(self.weights) / sum(self.weights)
        return rng.choice(len(p), int(sampling.size), replace=False, p=p)


def test_draws_one_after_the_other_are_caught() -> None:
    weights, size = WEIGHTS["many of few"]
    assert worst_z(taken(OneAfterTheOther(tuple(weights)), len(weights), size), probabilities(weights, size)) > 5


def test_all_pairs_of_weighted_clients_meet() -> None:
    for cohort, population, size in ((Weighted(), 8, 3), (Weighted(dict.fromkeys(range(60), 1.0)), 60, 4)):
        took_part = taken(cohort, population, size, rounds=5000)
        assert (took_part.T @ took_part)[np.triu_indices(population, k=1)].min() > 0


def test_weights_by_examples_are_the_clients_sizes() -> None:
    by_examples, by_hand = (draws(c, range(9), 2) for c in (Weighted(), Weighted({i: 1.0 + i for i in range(9)})))
    assert [by_examples.cohort(r) for r in range(50)] == [by_hand.cohort(r) for r in range(50)]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({0: 1.0, 1: 1.0}, "no weight for client 2"),
        ({0: 1.0, 1: 1.0, 2: 1.0, 7: 1.0}, "a weight for the unknown client 7"),
        ({0: 1.0, 1: -1.0, 2: 1.0}, "negative, infinite or NaN"),
        ({0: 1.0, 1: float("nan"), 2: 1.0}, "negative, infinite or NaN"),
        ({0: 1.0, 1: 0.0, 2: 0.0}, "gives 1 clients a weight above 0, but 2 take part"),
    ],
)
def test_weights_that_do_not_fit_are_refused(weights: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draws(Weighted(weights), range(3), 2)


def test_weights_by_examples_need_known_sizes() -> None:
    for population in (
        Population(ClientLoaders(range(3), lambda client: [[client]])),
        Population(ClientLoaders({1: [[0]]}), silos=3),
    ):
        with pytest.raises(ValueError, match="needs the number of examples of each client"):
            ParticipationSampler(Participation(Weighted(), 2), population, 0, LocalGroup())


@pytest.mark.parametrize(("population", "size"), [(7, 3), (6, 2), (5, 5), (4, 1)])
def test_taking_turns_covers_all_clients_evenly(population: int, size: int) -> None:
    took_part = taken(RoundRobin(), population, size, rounds=population)
    assert (took_part.sum(axis=1) == size).all()
    assert (took_part.sum(axis=0) == size).all()
    assert took_part[: -(-population // size)].any(axis=0).all()


@pytest.mark.parametrize(
    ("cohort", "clients_per_round", "expected"),
    [
        (Uniform(), None, Sampling("full", 50, 50, 1.0)),
        (Uniform(), 0.1, Sampling("fixed", 50, 5, 0.1)),
        (Uniform(), 50, Sampling("full", 50, 50, 1.0)),
        (Poisson(0.3), None, Sampling("poisson", 50, 15.0, 0.3)),
        (Poisson(1.0), None, Sampling("full", 50, 50.0, 1.0)),
        (Weighted(), 5, Sampling("other", 50, 5, 0.1)),
        (RoundRobin(), 5, Sampling("other", 50, 5, 0.1, separation=10)),
    ],
)
def test_a_cohort_describes_itself(cohort: Cohort, clients_per_round: Any, expected: Sampling) -> None:
    assert draws(cohort, range(50), clients_per_round).sampling == expected


@dataclass(frozen=True)
class Same(Cohort):
    positions: tuple[int, ...]

    def draw(self, sampling: Sampling, round: int, rng: Any, prepared: Any) -> np.ndarray:
        return np.array(self.positions)


@pytest.mark.parametrize("positions", [(0, 0), (0, 5), (-1, 0)])
def test_a_cohort_that_draws_nonsense_is_told(positions: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"drew a client twice or one that does not exist in round 4"):
        draws(Same(positions), range(5), 2).cohort(4)


@pytest.mark.parametrize("cohort", [Uniform(), Uniform(secure=True), Poisson(1e-3), Weighted(), RoundRobin()], ids=repr)
def test_a_million_clients_are_no_loop(cohort: Cohort) -> None:
    """A cohort of about 1,000 out of a million, drawn in less than a tenth of what one loop over all clients takes."""
    drawn = draws(cohort, range(10**6), None if isinstance(cohort, Poisson) else 1000)

    def seconds(work: Callable[[int], Any], rounds: int) -> float:
        times = []
        for round in range(rounds):
            start = time.process_time()
            work(round)
            times.append(time.process_time() - start)
        return min(times)

    loop = seconds(lambda round: [drawn.population.position(i) for i in range(10**6)], rounds=1)
    assert seconds(drawn.cohort, rounds=5) < 0.1 * loop


def test_long_mappings_are_compared_by_a_checksum() -> None:
    long, other = ({i: 1.0 + i for i in range(1000)} for _ in range(2))
    assert repr(Weighted(long)) == repr(Weighted(dict(reversed(other.items()))))
    other[3] = 7.0
    assert repr(Weighted(long)) != repr(Weighted(other))
    assert len(repr(Weighted(long))) < 100
