"""Accounting for many ledgers, one per client: the largest epsilon, and the noise that keeps it within a budget."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

import numpy as np

from lightning_fl.privacy.accounting.bounds import GRID, Entry, Method, dp_accounting, quiet_accountant
from lightning_fl.privacy.accounting.calibration import MAX_NOISE, MIN_NOISE, noise_multiplier_for
from lightning_fl.privacy.accounting.ledger import Epsilon, Gaussian, Ledger
from lightning_fl.privacy.accounting.sampling import Full, Poisson, Sampling

ORDERS = (*range(2, 33), 40, 48, 64, 96, 128, 256)


def largest_epsilon(
    ledgers: Iterable[Ledger], delta: float, method: Method = "pld", grid: float = GRID, group: int = 1
) -> tuple[Epsilon, Ledger]:
    """Returns the largest epsilon of the ledgers, and the ledger that has it; 0 without ledgers.

    A fast bound from a few orders of Renyi differential privacy rules out most ledgers.

    Args:
        ledgers: Ledgers of Poisson samples or full batches of examples.
        delta: The delta at which to answer.
        method: As for :meth:`Ledger.epsilon`.
        grid: As for :meth:`Ledger.epsilon`.
        group: As for :meth:`Ledger.epsilon`.
    """
    largest, of = Ledger().epsilon(delta, method), Ledger()
    for bound, ledger in _by_rough_bound(ledgers, delta, group):
        # The bounds fall, so no ledger after this one can have a larger epsilon.
        if bound <= largest:
            break
        found = ledger.epsilon(delta, method, grid=grid, group=group)
        # Both are upper bounds, so the smaller one holds.
        if min(found, bound) > largest:
            largest, of = Epsilon(min(found, bound), delta, method, found.relation, group), ledger
    return largest, of


def exceeding(
    ledgers: Iterable[Ledger], budget: float, delta: float, method: Method = "pld", group: int = 1
) -> Epsilon | None:
    """Returns the epsilon of a ledger that exceeds ``budget``; None if none does."""
    for bound, ledger in _by_rough_bound(ledgers, delta, group):
        if bound > budget and (found := ledger.epsilon(delta, method, group=group)) > budget:
            return found
    return None


def dominating(ledgers: Iterable[Ledger]) -> Ledger:
    """Returns a ledger that costs at least as much as each: for each noise the largest rate and the most releases."""
    most: dict[float, tuple[float, int]] = {}
    for ledger in ledgers:
        own: dict[float, tuple[float, int]] = {}
        for sigma, sampling, count in ledger.entries:
            rate, before = own.get(sigma, (0.0, 0))
            own[sigma] = max(rate, sampling.rate if isinstance(sampling, Poisson) else 1.0), before + count
        for sigma, (rate, count) in own.items():
            before_rate, before_count = most.get(sigma, (0.0, 0))
            most[sigma] = max(rate, before_rate), max(count, before_count)
    total = Ledger()
    for sigma, (rate, count) in most.items():
        total.record(Gaussian(sigma, Poisson(rate) if rate < 1 else Full()), count)
    return total


def _by_rough_bound(ledgers: Iterable[Ledger], delta: float, group: int) -> list[tuple[float, Ledger]]:
    """Ledgers without repetition, each with a fast upper bound, in falling order; there is none for groups."""
    found = {own.entries: (rough_epsilon(own.entries, delta) if group == 1 else math.inf, own) for own in ledgers}
    return sorted(found.values(), key=lambda pair: -pair[0])


def rough_epsilon(entries: Sequence[Entry], delta: float) -> float:
    """Returns an upper bound on epsilon within milliseconds, for Poisson samples or full batches of examples."""
    if not entries:
        return 0.0
    from dp_accounting import rdp  # type: ignore[import-not-found, unused-ignore]

    if any(sigma == 0 or not isinstance(sampling, Poisson | Full) for sigma, sampling, _ in entries):
        return math.inf
    total = sum(count * _rdp_of_one(sigma, sampling) for sigma, sampling, count in entries)
    return float(rdp.compute_epsilon(np.array(ORDERS), total, delta)[0])


@lru_cache(maxsize=4096)
def _rdp_of_one(sigma: float, sampling: Sampling) -> np.ndarray:
    dpa = dp_accounting()
    from dp_accounting import rdp

    accountant = rdp.RdpAccountant(orders=list(ORDERS))
    event = dpa.GaussianDpEvent(sigma)
    with quiet_accountant():
        accountant.compose(dpa.PoissonSampledDpEvent(sampling.rate, event) if isinstance(sampling, Poisson) else event)
    return np.asarray(accountant.rdp)


def noise_multiplier_for_all(
    epsilon: float, delta: float, counts: Mapping[Sampling, int], method: Method = "pld"
) -> float:
    """Returns the smallest noise multiplier (to 1e-3) with which no client exceeds ``epsilon``.

    Args:
        epsilon: The privacy budget of each client.
        delta: The delta at which it must hold.
        counts: For each sampling of batches, the largest number of steps of a client that uses it.
        method: As for :meth:`Ledger.epsilon`.

    Raises:
        ValueError: If no noise multiplier up to a million is enough.
    """

    def ledger(sigma: float, sampling: Sampling) -> Ledger:
        of_client = Ledger()
        of_client.record(Gaussian(sigma, sampling), counts[sampling])
        return of_client

    def rough(sigma: float) -> dict[Sampling, float]:
        return {sampling: rough_epsilon(ledger(sigma, sampling).entries, delta) for sampling in counts}

    # Exact calibration of every sampling would be slow. A rough one finds the sampling that probably needs the most
    # noise; it is calibrated exactly, then the others are checked, and any that exceeds the budget is calibrated too.
    low, high = MIN_NOISE, 1.0
    while max(rough(high).values()) > epsilon:
        low, high = high, 2 * high
        if high > MAX_NOISE:
            raise ValueError(f"target_epsilon={epsilon} at delta={delta} is out of reach; raise it, or train less.")
    while high - low > 0.02 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if max(rough(middle).values()) <= epsilon else (middle, high)
    bounds = rough(high)
    worst, answer, left = max(bounds, key=bounds.__getitem__), 0.0, dict(counts)
    while True:
        needed = noise_multiplier_for(epsilon, delta, left.pop(worst), worst, method, tolerance=1e-3)
        answer = max(answer, needed)
        of_sampling = {sampling: ledger(answer, sampling) for sampling in left}
        found, of = largest_epsilon(of_sampling.values(), delta, method)
        if found <= epsilon:
            return answer
        worst = next(sampling for sampling, candidate in of_sampling.items() if candidate == of)
