"""Tests whether a cohort draws as it declares, because privacy accounting relies on the declaration."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from lightning_fl.clients.cohorts import Cohort, CohortSampling
from lightning_fl.seeding import SystemRandomness

FALSE_ALARM_PROBABILITY = 1e-12
MAX_DRAWN, MAX_ROUNDS, MIN_ROUNDS = 2_000_000, 1024, 64


def check_draws(cohort: Cohort, sampling: CohortSampling, prepared: Any) -> None:
    """Draws many rounds of a cohort that declares uniform sampling or a separation, and checks the declaration.

    Cohorts of this package are not tested. A correct cohort fails with a probability of at most 1e-12.

    Args:
        cohort: The cohort.
        sampling: The sampling that it declares.
        prepared: The result of :meth:`Cohort.prepare`.

    Raises:
        ValueError: If it draws differently.
    """
    is_own = next(cls for cls in type(cohort).__mro__ if "draw" in vars(cls)).__module__.startswith("lightning_fl.")
    if is_own:
        return
    num_rounds = int(np.clip(MAX_DRAWN // max(sampling.num_clients, 1), MIN_ROUNDS, MAX_ROUNDS))
    if sampling.separation > 1:
        _check_separation(cohort, sampling, prepared, num_rounds)
    if sampling.kind not in ("poisson", "fixed"):
        return
    first, second = ([_draw(cohort, sampling, prepared, number) for number in range(num_rounds)] for _ in "ab")
    problem = _problem(first, sampling)
    # If almost all clients or hardly any are drawn, equal draws prove nothing.
    is_telling = num_rounds * _log_chance_of_equal_draws(sampling) < math.log(FALSE_ALARM_PROBABILITY)
    if is_telling and all(map(np.array_equal, first, second)):
        problem = "it draws the same clients every time, so it does not use the generator that it is given"
    if problem is not None:
        raise ValueError(
            f"{cohort!r} declares sampling(...).kind={sampling.kind!r} with {sampling.size:g} of "
            f"{sampling.num_clients} clients, and differential privacy relies on that, but in {num_rounds} rounds "
            f"{problem}. Draw from `rng` as declared, or declare kind='other', which gives no privacy amplification."
        )


def _check_separation(cohort: Cohort, sampling: CohortSampling, prepared: Any, num_rounds: int) -> None:
    last = np.full(sampling.num_clients, -sampling.separation)
    for number in range(num_rounds):
        drawn = _draw(cohort, sampling, prepared, number)
        soon = drawn[number - last[drawn] < sampling.separation]
        if len(soon):
            raise ValueError(
                f"{cohort!r} declares sampling(...).separation={sampling.separation}, and differential privacy relies "
                f"on that, but it drew client {soon[0]} in rounds {last[soon[0]]} and {number}. Draw each client at "
                f"most once in {sampling.separation} rounds, or declare the separation that holds."
            )
        last[drawn] = number


def _draw(cohort: Cohort, sampling: CohortSampling, prepared: Any, number: int) -> np.ndarray:
    return np.sort(np.asarray(cohort.draw(sampling, number, SystemRandomness(), prepared)))


def _log_chance_of_equal_draws(sampling: CohortSampling) -> float:
    clients, rate = sampling.num_clients, sampling.rate
    if sampling.kind == "poisson":
        return clients * math.log(rate**2 + (1 - rate) ** 2)
    size = int(sampling.size)
    return math.lgamma(size + 1) + math.lgamma(clients - size + 1) - math.lgamma(clients + 1)


def _problem(rounds: list[np.ndarray], sampling: CohortSampling) -> str | None:
    number, clients, rate = len(rounds), sampling.num_clients, sampling.rate
    log = -math.log(FALSE_ALARM_PROBABILITY / 8)
    sizes = np.array([len(drawn) for drawn in rounds])
    if sampling.kind == "fixed" and (sizes != int(sampling.size)).any():
        return f"it drew from {sizes.min()} to {sizes.max()} clients"
    total, trials = float(sizes.sum()), number * clients
    if sampling.kind == "poisson" and abs(total - trials * rate) > _bernstein(trials * rate * (1 - rate), 1.0, log):
        return f"it drew {total / number:.4g} clients per round, expected {clients * rate:.4g}"
    counts = np.bincount(np.concatenate(rounds), minlength=clients)
    worst = int(np.abs(counts - number * rate).argmax())
    # Each count is binomial, whether or not the cohort has a fixed size; there are as many of them as clients.
    if abs(counts[worst] - number * rate) > _bernstein(number * rate * (1 - rate), 1.0, log + math.log(clients)):
        return f"client {worst} was drawn {counts[worst]} times, expected {number * rate:.4g}"
    # The number of clients that two rounds share is random; pairs of rounds that have no round in common are
    # independent.
    pairs = list(zip(rounds[::2], rounds[1::2], strict=False))
    shared = float(sum(len(np.intersect1d(*pair)) for pair in pairs))
    expected, most = len(pairs) * clients * rate**2, max(float(sizes.max()), 1.0)
    spread = len(pairs) * (clients * rate**2 * (1 - rate**2) + (clients * rate**2) * rate)
    if abs(shared - expected) > _bernstein(spread, most, log):
        return f"consecutive rounds share {shared / len(pairs):.4g} clients, expected {expected / len(pairs):.4g}"
    if sampling.kind == "poisson" and clients > 1:
        found, variance = float(((sizes - clients * rate) ** 2).sum()), clients * rate * (1 - rate)
        fourth = 3 * variance**2 + variance * (1 - 6 * rate * (1 - rate))
        largest = (clients * max(rate, 1 - rate)) ** 2
        if found < number * variance - math.sqrt(2 * number * fourth * log) or found > number * variance + _bernstein(
            number * fourth, largest, log
        ):
            return f"the variance of its size is {found / number:.4g}, expected {variance:.4g}"
    return None


def _bernstein(variance: float, largest: float, log: float) -> float:
    """The distance from its mean that a sum of independent numbers exceeds with a probability of at most 2 e^-log."""
    return math.sqrt(2 * variance * log) + largest * log / 3 * 2
