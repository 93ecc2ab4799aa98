"""Weighted cohorts, in which some clients take part more often than others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lightning_fl.clients.cohorts import Cohort, Sampling, describe
from lightning_fl.clients.population import Population
from lightning_fl.seeding import Randomness


@dataclass(frozen=True)
class Inclusion:
    """The clients that can take part, with their inclusion probabilities.

    Args:
        positions: Their positions in the order of all clients.
        probabilities: Their probabilities of taking part in a round; they add up to the cohort's size.
        sums: Cumulative sums of the probabilities.
        odds: Cumulative sums of ``probability / (1 - probability)``; infinite if a client always takes part.
        few_collide: Whether draws with replacement rarely repeat a client, so that rejection sampling is cheap.
    """

    positions: np.ndarray
    probabilities: np.ndarray
    sums: np.ndarray
    odds: np.ndarray
    few_collide: bool

    @classmethod
    def of(cls, positions: np.ndarray, weights: np.ndarray, size: int) -> Inclusion:
        """Probabilities in proportion to positive weights, clipped to 1; they add up to ``size``."""
        # A client whose share would exceed 1 takes part in every round. The others then share the remaining places,
        # which can push the next client above 1, so this repeats until no client exceeds it.
        certain = np.zeros(len(weights), dtype=bool)
        while True:
            rest = size - certain.sum()
            # The bound avoids 0 / 0 when every client is certain.
            share = np.where(certain, 1.0, rest * weights / max(weights[~certain].sum(), 1e-300))
            if not (share > 1).any():
                break
            certain |= share > 1 - 1e-12
        # A client that always takes part has infinite odds, which rules out drawing by odds below.
        with np.errstate(divide="ignore"):
            odds = share / (1 - share)
        # Expected number of pairs of equal draws (the birthday problem); each costs another attempt.
        collisions = size**2 / 2 * ((odds / odds.sum()) ** 2).sum() if np.isfinite(odds).all() else np.inf
        return cls(positions, share, np.cumsum(share), np.cumsum(odds), bool(collisions < 2))


@dataclass(frozen=True)
class Weighted(Cohort):
    r"""``clients_per_round`` different clients; the larger a client's weight, the more often it takes part.

    Client :math:`i` takes part in a round with probability exactly :math:`\min(1, m w_i / \sum_j w_j)`, where clients
    that take part in every round count neither in the sum nor in :math:`m`. With ``weighting="uniform"`` and no such
    client, a round's mean is an unbiased estimate of the weighted mean of all clients. Small cohorts of a large
    population are drawn by Sampford's method, others by systematic sampling in a random order.

    Args:
        weights: ``"examples"``: the number of examples of each client; or a mapping of all clients to numbers that are
            not negative, such as the share of time that a device is online. A client with weight 0 never takes part.

    Raises:
        ValueError: If ``weights`` is neither; when training starts, if the weights don't fit the clients.

    Reference:
        Li et al., "On the Convergence of FedAvg on Non-IID Data", ICLR 2020 (sampling by size). Sampford, "On Sampling
        Without Replacement with Unequal Probabilities of Selection", Biometrika 1967.
    """

    weights: Literal["examples"] | Mapping[int | str, float] = "examples"

    def __post_init__(self) -> None:
        """Checks the arguments."""
        if self.weights != "examples" and not isinstance(self.weights, Mapping):
            raise ValueError(f"Weighted got weights={self.weights!r}; expected 'examples' or a mapping by client.")

    def __repr__(self) -> str:
        return f"Weighted({describe(self.weights)})"

    def prepare(self, population: Population, sampling: Sampling) -> Inclusion:
        """The clients with a positive weight, and their inclusion probabilities."""
        weights = self._weights(population)
        if not (np.isfinite(weights).all() and (weights >= 0).all()):
            raise ValueError(f"{self!r} holds weights that are negative, infinite or NaN.")
        positions = np.flatnonzero(weights)
        if len(positions) < sampling.size:
            raise ValueError(
                f"{self!r} gives {len(positions)} clients a weight above 0, but {int(sampling.size)} take part in each "
                "round. Lower clients_per_round, or give more clients a weight."
            )
        return Inclusion.of(positions, weights[positions], int(sampling.size))

    def draw(self, sampling: Sampling, round: int, rng: Randomness, prepared: Inclusion) -> np.ndarray:
        """See :meth:`Cohort.draw`."""
        size = int(sampling.size)
        chosen = _rejective(prepared, size, rng) if prepared.few_collide else _systematic(prepared, size, rng)
        return prepared.positions[chosen]

    def _weights(self, population: Population) -> np.ndarray:
        if isinstance(self.weights, Mapping):
            missing = [client for client in population.ids if client not in self.weights]
            unknown = [client for client in self.weights if client not in population]
            if missing or unknown:
                fault, client = ("no weight for", missing[0]) if missing else ("a weight for the unknown", unknown[0])
                raise ValueError(f"{self!r} has {fault} client {client!r}. Give exactly one weight for each client.")
            return np.array([self.weights[client] for client in population.ids], dtype=np.float64)
        sizes = population.all_sizes()
        if sizes is None:
            raise ValueError(
                "Weighted('examples') needs the number of examples of each client before training. Give a "
                "mapping, Weighted({client: weight, ...}), or ClientLoaders(..., num_examples=...)."
            )
        return np.array(sizes, dtype=np.float64)


def _rejective(inclusion: Inclusion, size: int, rng: Randomness) -> np.ndarray:
    """Sampford's method: draws with replacement, the first by probability, the others by odds, until all differ.

    Simply rejecting repeated clients would not give each client exactly its probability; drawing by odds does.
    """
    while True:
        points = rng.random(size)
        first = np.searchsorted(inclusion.sums, points[:1] * inclusion.sums[-1], side="right")
        others = np.searchsorted(inclusion.odds, points[1:] * inclusion.odds[-1], side="right")
        # Rounding may put a point at the very end of the line, beyond the last client.
        chosen = np.unique(np.minimum([*first, *others], len(inclusion.sums) - 1))
        if len(chosen) == size:
            return chosen


def _systematic(inclusion: Inclusion, size: int, rng: Randomness) -> np.ndarray:
    """Systematic sampling: equally spaced points on a line of the clients' probabilities, in random order."""
    order = rng.permutation(len(inclusion.positions))
    ends = np.cumsum(inclusion.probabilities[order])
    # Spaced by the floating-point sum, so that all points lie on the line.
    points = (rng.random(1) + np.arange(size)) * (ends[-1] / size)
    return order[np.minimum(np.searchsorted(ends, points, side="right"), len(order) - 1)]
