from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
)

from lightning_fl.clients import Population
from lightning_fl.data.client_loaders import ClientLoaders, count_batches, count_examples

NUMBERS = TensorDataset(torch.arange(10))


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[int]:
        yield from range(10)


class StreamWithLength(Stream):
    def __len__(self) -> int:
        return 10


def population(ids: Sequence[Any], **kwargs: Any) -> Population:
    return Population(ClientLoaders(ids, lambda client: [[0]] * (len(str(client)) % 3), **kwargs))


@pytest.mark.parametrize(
    ("ids", "ordered"),
    [
        (["b", "a", "c"], ["a", "b", "c"]),
        ([10, 9, 1], [1, 9, 10]),
        (["10", 9, "9", 10], [9, 10, "10", "9"]),
        (range(3), [0, 1, 2]),
        (range(3, 0, -1), [1, 2, 3]),
    ],
)
def test_the_order_is_the_same_however_the_ids_are_given(ids: Sequence[Any], ordered: list[Any]) -> None:
    for given in (ids, list(ids)[::-1]):
        clients = population(given)
        assert list(clients.ids) == ordered
        assert [clients.position(client) for client in ordered] == list(range(len(ordered)))
        assert len(clients) == len(ordered)


def test_a_billion_clients_cost_nothing() -> None:
    clients = population(range(10**9))
    assert clients.ids == range(10**9)
    assert clients.position(10**8) == 10**8


def test_with_silos_each_rank_is_a_client_but_holds_only_its_own_data() -> None:
    clients = Population(ClientLoaders({2: [[0]]}), silos=4)
    assert (list(clients.ids), list(clients.loaders), len(clients)) == ([0, 1, 2, 3], [2], 4)
    assert clients.place([0, 1, 3], num_ranks=4, at_home=False) == [[0], [1], [], [3]]


def test_clients_go_to_their_home_rank_or_where_there_is_room() -> None:
    sizes = {"a": 1, "b": 1, "c": 1, "d": 3}
    clients = Population(ClientLoaders(sizes, lambda client: [], num_examples=sizes.__getitem__))
    assert clients.place(["a", "b", "d"], num_ranks=2, at_home=True) == [["a"], ["b", "d"]]
    assert clients.place(["a", "b", "d"], num_ranks=2, at_home=False) == [["d"], ["a", "b"]]


@pytest.mark.parametrize("told", [True, False])
def test_a_clients_size_is_what_was_told_or_what_its_loader_says(told: bool) -> None:
    made: list[str] = []
    lengths = {"a": 10, "b": 2, "c": 3}

    def make(client: str) -> DataLoader:
        made.append(client)
        return DataLoader(range(lengths[client]))

    clients = Population(ClientLoaders(lengths, make, num_examples=lengths.__getitem__ if told else None))
    assert clients.place(["a", "b", "c"], num_ranks=2, at_home=False) == [["a"], ["b", "c"]]
    assert made == ([] if told else ["a", "b", "c"])


def test_loaders_of_unknown_size_are_placed_too() -> None:
    clients = Population(ClientLoaders(range(3), lambda client: (batch for batch in [0])))
    assert clients.place([0, 1, 2], num_ranks=2, at_home=False) == [[0, 2], [1]]


def test_what_the_user_tells_comes_before_the_loader() -> None:
    loader = DataLoader(NUMBERS, batch_size=3)
    assert Population(ClientLoaders([loader])).num_examples(0, loader) == 10
    assert Population(ClientLoaders([0], lambda _: loader, num_examples=lambda _: 7)).num_examples(0, loader) == 7


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(NUMBERS),
        DataLoader(NUMBERS, batch_size=3),
        DataLoader(NUMBERS, batch_size=3, drop_last=True),
        DataLoader(NUMBERS, batch_size=3, shuffle=True),
        DataLoader(NUMBERS, batch_size=20, drop_last=True),
        DataLoader(NUMBERS, batch_size=2, sampler=SubsetRandomSampler(range(5))),
        DataLoader(NUMBERS, batch_size=2, sampler=RandomSampler(NUMBERS, replacement=True, num_samples=17)),
        DataLoader(NUMBERS, batch_sampler=BatchSampler(SequentialSampler(NUMBERS), 4, drop_last=True)),
    ],
)
def test_counts_are_what_one_pass_yields(loader: DataLoader) -> None:
    batches = list(loader)
    assert count_batches(loader) == len(batches)
    assert count_examples(loader) == sum(len(batch[0]) for batch in batches)


@pytest.mark.parametrize(
    ("loader", "num_batches"),
    [
        (DataLoader(NUMBERS, batch_sampler=[[0, 1], [2]]), 2),
        (DataLoader(NUMBERS, batch_size=None), 10),
        (DataLoader(Stream(), batch_size=3), None),
        (DataLoader(StreamWithLength(), batch_size=3), 4),
        ([1, 2, 3], 3),
        (iter([1, 2, 3]), None),
    ],
)
def test_what_cannot_be_told_beforehand_is_none(loader: Any, num_batches: int | None) -> None:
    assert count_batches(loader) == num_batches
    assert count_examples(loader) is None
