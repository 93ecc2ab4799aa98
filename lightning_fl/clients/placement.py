"""Placement: which rank trains which client of the cohort."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lightning_fl.types import ClientId


def place_by_size(
    cohort: Sequence[ClientId], size_of: Callable[[ClientId], float], num_ranks: int
) -> list[list[ClientId]]:
    """Spreads a cohort over ranks so that the largest load is small: each time the largest client to the freest rank.

    Args:
        cohort: The clients of the round.
        size_of: The work a client is, in any unit. Not asked with a single rank.
        num_ranks: Number of ranks.

    Returns:
        For each rank its clients in the order of ``cohort``; some lists may be empty.
    """
    if num_ranks == 1:
        return [list(cohort)]
    sizes = [size_of(client) for client in cohort]
    loads = [0.0] * num_ranks
    rank_of = [0] * len(cohort)
    for index in sorted(range(len(cohort)), key=lambda index: -sizes[index]):
        rank = min(range(num_ranks), key=loads.__getitem__)
        rank_of[index] = rank
        loads[rank] += sizes[index]
    return [[client for client, own in zip(cohort, rank_of, strict=True) if own == rank] for rank in range(num_ranks)]


def place_at_home(
    cohort: Sequence[ClientId], position_of: Callable[[ClientId], int], num_ranks: int
) -> list[list[ClientId]]:
    """Puts every client on its home rank, ``position mod num_ranks``, where its state lives.

    Args:
        cohort: The clients of the round.
        position_of: A client's position among all clients, in the order that is the same on every rank.
        num_ranks: Number of ranks.
    """
    placement: list[list[ClientId]] = [[] for _ in range(num_ranks)]
    for client in cohort:
        placement[position_of(client) % num_ranks].append(client)
    return placement
