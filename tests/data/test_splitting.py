from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_fl.data.client_loaders import count_examples
from lightning_fl.data.partitioners.partitioner import IID
from lightning_fl.data.splitting import check_loader_options, check_splittable, partition_loader, split_loader

NUMBERS = TensorDataset(torch.arange(10))
PARTS = [torch.tensor([0, 2, 4, 6, 8]), torch.tensor([1, 3, 5]), torch.tensor([], dtype=torch.int64)]


def collate(samples: list) -> torch.Tensor:
    return torch.stack([sample[0] for sample in samples])


def init_worker(worker: int) -> None:
    pass


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[int]:
        yield from range(10)


class Buckets(BatchSampler):
    def __init__(self, dataset: TensorDataset) -> None:
        super().__init__(SequentialSampler(dataset), 2, drop_last=False)


class Seeded(Sampler[int]):
    """A permutation from a generator of its own, as chemprop's."""

    def __init__(self, size: int) -> None:
        self.order, self.rg = np.arange(size), np.random.default_rng(0)

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[int]:
        self.rg.shuffle(self.order)
        return iter(self.order)


class Twice(Seeded):
    def __iter__(self) -> Iterator[int]:
        return iter([0, 0, *range(2, len(self))])


class Reversed(DataLoader):
    def __iter__(self) -> Iterator:
        return reversed(list(super().__iter__()))


def numbers_of(loader: DataLoader) -> list[list[int]]:
    return [batch[0].tolist() for batch in loader]


def test_each_client_reads_its_part_in_batches() -> None:
    clients = split_loader(DataLoader(NUMBERS, batch_size=2), PARTS)
    assert list(clients) == [0, 1, 2]
    assert [numbers_of(clients[client]) for client in clients] == [[[0, 2], [4, 6], [8]], [[1, 3], [5]], []]


@pytest.mark.parametrize("options", [{}, {"shuffle": True}, {"drop_last": True}, {"num_workers": 1}])
def test_an_empty_part_gives_an_empty_loader(options: dict) -> None:
    loader = split_loader(DataLoader(NUMBERS, batch_size=2, **options), PARTS)[2]
    assert len(loader) == 0
    assert numbers_of(loader) == []


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_num_examples_is_what_one_pass_yields(batch_size: int, drop_last: bool) -> None:
    clients = split_loader(DataLoader(NUMBERS, batch_size=batch_size, drop_last=drop_last), PARTS)
    for client, loader in clients.items():
        assert clients.num_examples(client) == sum(map(len, numbers_of(loader)))


def test_loaders_are_made_on_demand() -> None:
    clients = split_loader(DataLoader(NUMBERS), PARTS)
    assert clients[0] is not clients[0]


def test_a_shuffled_loader_gives_shuffled_clients_that_share_its_generator() -> None:
    generator = torch.Generator()
    part = torch.arange(100)
    loader = DataLoader(TensorDataset(torch.arange(100)), batch_size=100, shuffle=True, generator=generator)
    client = split_loader(loader, [part])[0]
    assert client.generator is generator
    (first,), (other,) = numbers_of(client), numbers_of(client)
    generator.manual_seed(5)
    (one,) = numbers_of(client)
    generator.manual_seed(5)
    (same,) = numbers_of(client)
    assert sorted(first) == part.tolist()
    assert first != other
    assert one == same


def test_the_generator_of_a_random_sampler_is_kept() -> None:
    generator = torch.Generator()
    loader = DataLoader(NUMBERS, sampler=RandomSampler(NUMBERS, generator=generator))
    assert split_loader(loader, PARTS)[0].generator is generator


def test_options_of_the_loader_are_kept() -> None:
    loader = DataLoader(
        NUMBERS,
        batch_size=3,
        num_workers=1,
        collate_fn=collate,
        drop_last=True,
        timeout=7,
        worker_init_fn=init_worker,
        multiprocessing_context="spawn",
        prefetch_factor=3,
        persistent_workers=True,
        in_order=False,
    )
    client = split_loader(loader, PARTS)[0]
    kept = "batch_size num_workers collate_fn pin_memory drop_last timeout worker_init_fn prefetch_factor in_order"
    assert {name: getattr(client, name) for name in kept.split()} == {
        name: getattr(loader, name) for name in kept.split()
    }
    assert client.multiprocessing_context is loader.multiprocessing_context
    assert not client.persistent_workers


def test_a_loader_without_batches_of_its_own_stays_so() -> None:
    clients = split_loader(DataLoader(NUMBERS, batch_size=None), PARTS)
    assert [int(number) for (number,) in clients[1]] == [1, 3, 5]
    assert clients.num_examples(1) is None


def test_data_sets_are_indexed_with_plain_integers() -> None:
    class Strict:
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> int:
            assert type(index) is int
            return index

    clients = split_loader(DataLoader(Strict(), batch_size=2), [torch.tensor([3, 1])])
    assert [batch.tolist() for batch in clients[0]] == [[3, 1]]


def test_partition_loader_partitions_and_splits() -> None:
    clients = partition_loader(DataLoader(NUMBERS, batch_size=2), IID(), 3, seed=1)
    parts = IID()(NUMBERS, 3, seed=1)
    assert [list(chain.from_iterable(numbers_of(loader))) for loader in clients.values()] == [
        part.tolist() for part in parts
    ]


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ([DataLoader(NUMBERS)], "is a list; .* one plain DataLoader"),
        ({"a": DataLoader(NUMBERS)}, "is a dict; .* one plain DataLoader"),
        (Reversed(NUMBERS), "is a Reversed; .* one plain DataLoader"),
        (DataLoader(Stream()), "reads Stream, a stream; .* map-style data set"),
        (DataLoader(NUMBERS, sampler=SequentialSampler(range(4))), "draws 4 of 10 samples"),
        (DataLoader(NUMBERS, sampler=iter([1, 2])), r"draws \? of 10 samples"),
        (DataLoader(NUMBERS, sampler=DistributedSampler(NUMBERS, 1, 0)), "custom sampler DistributedSampler"),
        (DataLoader(NUMBERS, sampler=WeightedRandomSampler([1.0] * 4, 10)), "draws 10 with replacement of 10"),
        (DataLoader(NUMBERS, batch_sampler=[[0, 1], [2]]), "custom batch_sampler list"),
        (DataLoader(NUMBERS, sampler=Buckets(NUMBERS), batch_size=None), "custom batch_sampler Buckets"),
    ],
)
def test_what_cannot_be_split_is_refused_with_the_remedy(loader: object, message: str) -> None:
    with pytest.raises(ValueError, match=f"{message}.*ClientLoaders"):
        check_splittable(loader)
    with pytest.raises(ValueError, match=f"{message}.*ClientLoaders"):
        split_loader(loader, PARTS)
    with pytest.raises(ValueError, match=f"{message}.*ClientLoaders"):
        partition_loader(loader, IID(), 2)


BIG = TensorDataset(torch.arange(100))
EVEN = torch.arange(0, 100, 2)
HALVES = [EVEN, EVEN + 1]


def drawn(loader: DataLoader) -> list[int]:
    return list(chain.from_iterable(numbers_of(loader)))


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(BIG, batch_size=8, sampler=Seeded(100)),
        DataLoader(BIG, batch_sampler=BatchSampler(RandomSampler(BIG), 8, drop_last=False)),
        DataLoader(BIG, sampler=BatchSampler(Seeded(100), 8, drop_last=False), batch_size=None),
        DataLoader(BIG, batch_size=8, sampler=SubsetRandomSampler(range(100))),
    ],
    ids=["own permutation", "batch sampler", "batches as samples", "subset"],
)
def test_the_samplers_of_clients_draw_their_samples_once_in_batches_of_the_size(loader: DataLoader) -> None:
    clients = split_loader(loader, HALVES)
    for client, part in enumerate(HALVES):
        own = clients[client]
        assert sorted(drawn(own)) == part.tolist() != drawn(own)
        assert [len(batch) for batch in numbers_of(own)] == [8] * 6 + [2]
        assert clients.num_examples(client) == count_examples(own) == 50
        torch.manual_seed(3)
        first = drawn(clients[client])
        assert drawn(clients[client]) != first
        torch.manual_seed(3)
        assert drawn(clients[client]) == first  # it depends on the client's random numbers alone


def test_a_weighted_sampler_keeps_the_weights_of_the_clients_samples() -> None:
    weights = torch.where(torch.arange(100) < 10, 1.0, 0.0)
    clients = split_loader(DataLoader(BIG, batch_size=5, sampler=WeightedRandomSampler(weights, 200)), HALVES)
    for client, part in enumerate(HALVES):
        found = drawn(clients[client])
        assert len(found) == clients.num_examples(client) == 100  # its share of the 200 draws
        assert set(found) == {number for number in part.tolist() if number < 10}


@pytest.mark.parametrize("replacement", [True, False])
def test_a_client_whose_samples_have_no_weight_has_no_data(replacement: bool) -> None:
    weights = torch.where(HALVES[0].new_zeros(100).index_fill(0, HALVES[0][:7], 1) > 0, 1.0, 0.0)
    sampler = WeightedRandomSampler(weights, 100, replacement)
    clients = split_loader(DataLoader(BIG, batch_size=5, sampler=sampler), HALVES)
    assert (clients.num_examples(1), drawn(clients[1])) == (0, [])
    assert len(drawn(clients[0])) == clients.num_examples(0) == (50 if replacement else 7)


@pytest.mark.parametrize(
    ("sampler", "size"),
    [
        (RandomSampler(BIG, replacement=True, num_samples=60), 30),
        (RandomSampler(BIG, num_samples=60), 30),
        (SubsetRandomSampler(range(40)), 20),
    ],
)
def test_clients_draw_their_share(sampler: Sampler[int], size: int) -> None:
    clients = split_loader(DataLoader(BIG, batch_size=4, sampler=sampler), HALVES)
    for client, part in enumerate(HALVES):
        found = drawn(clients[client])
        assert len(found) == clients.num_examples(client) == size
        assert set(found) <= set(part.tolist())


def test_a_sampler_that_is_no_permutation_is_named_when_it_draws() -> None:
    clients = split_loader(DataLoader(BIG, sampler=Twice(100)), HALVES)
    with pytest.raises(ValueError, match=r"Twice draws 99 different samples out of 100.*sampler=lambda dataset"):
        drawn(clients[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"colate_fn": list}, "'colate_fn' is not an argument of a DataLoader"),
        ({"sampler": Seeded(3)}, "sampler is a Seeded, .* sampler=lambda dataset: Seeded"),
        ({"batch_sampler": [[0]]}, "batch_sampler is a list"),
    ],
)
def test_wrong_loader_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_loader_options(options)
