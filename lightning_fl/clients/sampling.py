"""Cohorts: which clients take part in a round."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_fl.clients.seeding import round_rng
from lightning_fl.types import ClientId


def cohort_size(clients_per_round: int | float | None, population: int) -> int:
    """Number of clients in a round.

    Args:
        clients_per_round: A count (int), a share in (0, 1] (float), or None for all.
        population: Number of clients in the federation.

    Raises:
        ValueError: If the count or the share is out of range.
    """
    if clients_per_round is None:
        return population
    if isinstance(clients_per_round, bool) or not isinstance(clients_per_round, int | float):
        raise ValueError(
            f"clients_per_round={clients_per_round!r} is neither a count (int), a share (float) nor None (all)."
        )
    if isinstance(clients_per_round, float):
        if not 0.0 < clients_per_round <= 1.0:
            raise ValueError(
                f"clients_per_round={clients_per_round} as a float is a share and must lie in (0, 1]; write an int for "
                "a count."
            )
        return max(1, round(clients_per_round * population))
    if clients_per_round < 1:
        raise ValueError(f"clients_per_round={clients_per_round} must be at least 1.")
    if clients_per_round > population:
        raise ValueError(
            f"clients_per_round={clients_per_round} is more than the federation's {population} clients. Lower it, or "
            "give a share such as 0.1."
        )
    return clients_per_round


def sample_cohort(clients: Sequence[ClientId], size: int, seed: int, round: int) -> list[ClientId]:
    """Draws ``size`` clients uniformly without replacement, in the order of ``clients``.

    Args:
        clients: All clients, in an order that is the same on every rank.
        size: Number of clients to draw.
        seed: Seed of the federation.
        round: Number of the round.
    """
    if size == len(clients):
        return list(clients)
    chosen = round_rng(seed, round, "cohort").choice(len(clients), size, replace=False, shuffle=False)
    return [clients[index] for index in sorted(chosen.tolist())]
