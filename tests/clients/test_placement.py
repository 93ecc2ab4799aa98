from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_fl.clients import place_at_home, place_by_size

num_ranks = st.integers(1, 5)
sizes = st.lists(st.integers(0, 20), max_size=12)


def loads(placement: Sequence[Sequence[int]], sizes: Sequence[int]) -> list[int]:
    return [sum(sizes[client] for client in clients) for clients in placement]


def smallest_largest_load(sizes: Sequence[int], num_ranks: int) -> int:
    """The best that any placement can do, by trying all."""
    return min(
        max(sum(size for size, own in zip(sizes, ranks, strict=True) if own == rank) for rank in range(num_ranks))
        for ranks in product(range(num_ranks), repeat=len(sizes))
    )


@given(sizes, num_ranks)
def test_by_size_every_client_trains_once_and_in_the_order_of_the_cohort(sizes: list[int], num_ranks: int) -> None:
    cohort = list(range(len(sizes)))[::-1]
    placement = place_by_size(cohort, sizes.__getitem__, num_ranks)
    assert len(placement) == num_ranks
    assert sorted(client for clients in placement for client in clients) == sorted(cohort)
    assert all(clients == sorted(clients, reverse=True) for clients in placement)


@given(sizes, num_ranks)
def test_by_size_is_a_pure_function(sizes: list[int], num_ranks: int) -> None:
    first, second = (place_by_size(range(len(sizes)), sizes.__getitem__, num_ranks) for _ in range(2))
    assert first == second


@given(st.lists(st.integers(1, 20), min_size=1, max_size=6), st.integers(2, 3))
def test_the_largest_load_is_at_most_four_thirds_of_the_best(sizes: list[int], num_ranks: int) -> None:
    placement = place_by_size(range(len(sizes)), sizes.__getitem__, num_ranks)
    assert max(loads(placement, sizes)) <= 4 / 3 * smallest_largest_load(sizes, num_ranks) + 1e-9


def test_dealing_clients_in_turn_would_break_the_bound() -> None:
    sizes = [10, 1, 10, 1]
    dealt = [list(range(rank, 4, 2)) for rank in range(2)]
    assert max(loads(dealt, sizes)) > 4 / 3 * smallest_largest_load(sizes, 2)
    assert max(loads(place_by_size(range(4), sizes.__getitem__, 2), sizes)) == smallest_largest_load(sizes, 2)


@pytest.mark.parametrize("cohort", [[], ["a"], ["a", "b"]])
def test_ranks_without_clients_get_an_empty_list(cohort: list[str]) -> None:
    placement = place_by_size(cohort, lambda client: 5, 4)
    assert sorted(map(len, placement)) == [0] * (4 - len(cohort)) + [1] * len(cohort)


def test_a_single_rank_takes_all_and_asks_no_size() -> None:
    def refuse(client: str) -> float:
        raise AssertionError("asked for a size")

    assert place_by_size(["b", "a"], refuse, 1) == [["b", "a"]]


@given(st.sets(st.integers(0, 30)), num_ranks)
def test_at_home_a_client_is_where_its_position_says(cohort: set[int], num_ranks: int) -> None:
    placement = place_at_home(sorted(cohort), lambda client: client + 1, num_ranks)
    assert len(placement) == num_ranks
    assert sorted(client for clients in placement for client in clients) == sorted(cohort)
    for rank, clients in enumerate(placement):
        assert all((client + 1) % num_ranks == rank for client in clients)
        assert clients == sorted(clients)
