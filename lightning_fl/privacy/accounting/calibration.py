"""Calibration: the noise that a target epsilon requires."""

from __future__ import annotations

from collections.abc import Callable

from lightning_fl.privacy.accounting.bounds import GRID, Method, Relation, default_relation, epsilon_of
from lightning_fl.privacy.accounting.ledger import Gaussian, Ledger
from lightning_fl.privacy.accounting.sampling import Full, Sampling

MIN_NOISE, MAX_NOISE = 0.05, 1e6
COARSE_GRID = 1e-3


def noise_multiplier_for(
    epsilon: float,
    delta: float,
    count: int,
    sampling: Sampling | None = None,
    method: Method = "pld",
    relation: Relation | None = None,
    tolerance: float = 1e-4,
) -> float:
    """Returns the smallest noise multiplier with which ``count`` releases stay within ``epsilon``.

    Args:
        epsilon: The total privacy budget.
        delta: The delta at which it must hold.
        count: Number of releases: rounds or steps.
        sampling: How the contributors to each release are drawn. None: everybody contributes.
        method: As for :meth:`Ledger.epsilon`.
        relation: As for :meth:`Ledger.epsilon`.
        tolerance: Maximum distance of the answer above the smallest one; it is never below. Default 1e-4.

    Raises:
        ValueError: If an argument is out of range, or no noise multiplier up to a million is enough.
    """
    if not epsilon > 0:
        raise ValueError(f"epsilon={epsilon} must be positive.")

    ledger = Ledger()
    ledger.record(Gaussian(1.0, sampling or Full()), count)
    ledger.epsilon(delta, method, relation)  # only to refuse invalid arguments with the ledger's messages

    def excess(noise_multiplier: float, method: Method = "rdp", grid: float = GRID) -> float:
        entries = ((noise_multiplier, sampling or Full(), count),)
        return epsilon_of(entries, delta, method, relation or default_relation(entries), grid) - epsilon

    # RDP takes milliseconds and its answer is close, so it goes first; PLD, on a coarse and then on the fine grid, only
    # refines it.
    high = 1.0
    while excess(high) > 0:
        high *= 2
        if high > MAX_NOISE:
            raise ValueError(f"epsilon={epsilon} at delta={delta} can't be reached; raise one, or release less often.")
    high = _smallest(excess, high, tolerance if method == "rdp" else 0.01 * high)
    if method == "pld":
        high = _smallest(lambda sigma: excess(sigma, "pld", COARSE_GRID), high, 10 * tolerance)
        while excess(high, "pld") > 0:
            high += tolerance
        high = _smallest(lambda sigma: excess(sigma, "pld"), high, tolerance)
    return high


def _smallest(excess: Callable[[float], float], high: float, tolerance: float) -> float:
    """Searches down from ``high`` for the smallest argument at which ``excess``, a decreasing function, is at most 0.

    ``excess(high)`` must be at most 0. Steps of secant and bisection alternate: the secant is fast, but alone it can
    creep along one side of a curved function.
    """
    at_high, step = excess(high), 4 * tolerance
    while True:
        low = max(high - step, MIN_NOISE)
        if low >= high:
            return high
        at_low = excess(low)
        if at_low > 0:
            break
        high, at_high, step = low, at_low, 4 * step
    by_secant = True
    while high - low > tolerance:
        middle = (low + high) / 2
        if by_secant:
            guess = high - at_high * (high - low) / (at_high - at_low) + tolerance / 4
            middle = min(max(guess, low + tolerance / 2), high - tolerance / 2)
        by_secant = not by_secant
        found = excess(middle)
        low, at_low, high, at_high = (low, at_low, middle, found) if found <= 0 else (middle, found, high, at_high)
    return high
