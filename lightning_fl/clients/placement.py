"""Placement: which rank trains which client of the cohort."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lightning_fl.types import ClientId


def place_by_size(
    cohort: Sequence[ClientId], size_of: Callable[[ClientId], float], num_ranks: int
) -> list[list[ClientId]]:
    """Balances the load: assigns clients from the largest to the smallest, each to the rank with the least load so far.

    This is the longest-processing-time rule; its largest load is at most 4/3 of the best possible one (Graham 1969).

    Args:
        cohort: The clients of the round.
        size_of: A client's load, in any unit. Not called with a single rank, because a size can be costly to find out.
        num_ranks: Number of ranks.

    Returns:
        The clients of each rank, in the order of ``cohort``; some lists may be empty.
    """
    if num_ranks == 1:
        return [list(cohort)]
    sizes = [size_of(client) for client in cohort]
    loads = [0.0] * num_ranks
    rank_of = [0] * len(cohort)
    # Ties are decided by position in the stable sort and in `min`, so every rank computes the same placement by itself.
    for index in sorted(range(len(cohort)), key=lambda index: -sizes[index]):
        rank = min(range(num_ranks), key=loads.__getitem__)
        rank_of[index] = rank
        loads[rank] += sizes[index]
    return [
        [client for client, its_rank in zip(cohort, rank_of, strict=True) if its_rank == rank]
        for rank in range(num_ranks)
    ]


def place_at_home(
    cohort: Sequence[ClientId], position_of: Callable[[ClientId], int], num_ranks: int
) -> list[list[ClientId]]:
    """Sticky placement: every client trains on its home rank, ``position mod num_ranks``, in every round.

    For algorithms with client state, which then stays on one rank instead of being sent each round.

    Args:
        cohort: The clients of the round.
        position_of: A client's position in the order of all clients, which is the same on every rank.
        num_ranks: Number of ranks.
    """
    placement: list[list[ClientId]] = [[] for _ in range(num_ranks)]
    for client in cohort:
        placement[position_of(client) % num_ranks].append(client)
    return placement
