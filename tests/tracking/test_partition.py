"""Who has what: counts by label, sizes and label skew, each against numbers worked out by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset

from lightning_fl.clients import Population
from lightning_fl.communication import LocalGroup
from lightning_fl.data.client_loaders import ClientLoaders
from lightning_fl.tracking import PartitionSummary, summarise
from tests.helpers.federation import join_ranks


def labelled(labels: Any) -> TensorDataset:
    return TensorDataset(torch.zeros(len(labels), 2), torch.as_tensor(labels))


def look(*datasets: Dataset, **options: Any) -> PartitionSummary:
    loaders = ClientLoaders([DataLoader(dataset, batch_size=2) for dataset in datasets])
    return summarise(Population(loaders), LocalGroup(), **options)


def test_each_clients_labels_are_counted() -> None:
    found = look(labelled([0, 0, 3]), labelled([3, 7]))
    assert found.labels == ["0", "3", "7"]
    assert found.counts == [[2, 1, 0], [0, 1, 1]]
    assert found.sizes == [3, 2]
    assert PartitionSummary.from_dict(found.as_dict()) == found


def test_parts_of_a_data_set_are_looked_up_in_the_whole() -> None:
    whole = labelled([0, 1, 1, 2])
    joined = ConcatDataset([Subset(whole, [3]), labelled([2])])
    assert look(Subset(whole, [0, 1]), joined).counts == [[1, 1, 0], [0, 0, 2]]


@pytest.mark.parametrize(
    ("clients", "skew"),
    [
        ([[0, 1], [0, 1]], 0.0),
        ([[0, 0], [1, 1]], 0.5),
        ([[0, 0, 0], [1]], 3 / 8),  # pooled (3/4, 1/4): distances 1/4 and 3/4, weights 3/4 and 1/4
        ([[0], [1], [2], [3]], 0.75),
    ],
)
def test_label_skew_is_the_mean_total_variation_distance(clients: list[list[int]], skew: float) -> None:
    assert look(*map(labelled, clients)).label_skew == pytest.approx(skew)


def test_the_skew_by_chance_is_that_of_shuffled_labels() -> None:
    labels = np.random.default_rng(1).integers(0, 5, 4000)
    sorted_out = look(*(labelled(np.sort(labels)[start::1][:400]) for start in range(0, 4000, 400)))
    shuffled = look(*(labelled(labels[start : start + 400]) for start in range(0, 4000, 400)))
    assert sorted_out.label_skew > 0.5
    assert shuffled.label_skew == pytest.approx(shuffled.label_skew_if_iid, abs=0.01)
    assert sorted_out.label_skew_if_iid == pytest.approx(shuffled.label_skew, abs=0.01)


def test_numeric_targets_are_counted_by_range() -> None:
    found = look(labelled(torch.linspace(0, 1, 100)), labelled(torch.linspace(0, 0.1, 100)))
    assert len(found.labels) == 10
    assert [sum(counts) for counts in found.counts] == [100, 100]
    assert found.counts[1][-1] == 0


def test_several_labels_of_an_example_count_each() -> None:
    found = look(labelled([[1, 1, 0], [0, 1, 0]]), labelled([[0, 0, 1]]))
    assert found.counts == [[1, 2, 0], [0, 0, 1]]


class Unnamed(Dataset):
    """Keeps no labels that could be looked up."""

    def __init__(self, labels: list[int]) -> None:
        self.hidden = labels
        self.num_read = 0

    def __len__(self) -> int:
        return len(self.hidden)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        self.num_read += 1
        return torch.zeros(1), self.hidden[index]


def test_samples_are_read_only_when_asked_for() -> None:
    dataset = Unnamed([1, 1, 4])
    assert look(dataset).counts == ()
    assert look(dataset).label_skew is None
    assert dataset.num_read == 0
    assert look(dataset, read_samples=True).counts == [[2, 1]]


def test_what_has_no_labels_shows_sizes_only() -> None:
    found = look(TensorDataset(torch.zeros(3, 2)), TensorDataset(torch.zeros(1, 2)))
    assert (found.sizes, found.labels, found.label_skew) == ([3, 1], (), None)
    streams = summarise(Population(ClientLoaders([iter(()), iter(())])), LocalGroup())
    assert streams.sizes == [None, None]


def test_an_empty_client_counts_none() -> None:
    found = look(labelled([0, 1]), Subset(labelled([0, 1]), []))
    assert found.counts == [[1, 1], [0, 0]]
    assert found.label_skew == 0.0


def test_of_many_clients_only_so_many_are_made() -> None:
    made = []

    def make(client: int) -> DataLoader:
        made.append(client)
        return DataLoader(labelled([client % 2]))

    population = Population(ClientLoaders(range(1_000_000), make, num_examples=lambda client: 1))
    found = summarise(population, LocalGroup(), max_clients=5)
    assert found.num_clients == 1_000_000
    assert found.ids == [0, 249_999, 499_999, 749_999, 999_999]
    assert len(made) == 5


def look_as_silo(share_labels: bool) -> dict[str, Any]:
    group = join_ranks()
    loader = DataLoader(labelled([0, 0, 2] if group.rank else [1, 2]), batch_size=2)
    population = Population(ClientLoaders({group.rank: loader}), silos=group.size)
    return summarise(population, group, share_labels=share_labels).as_dict()


def test_silos_tell_their_labels_only_if_asked_to(run_ranks: Any) -> None:
    shared = run_ranks(2, look_as_silo, True)
    assert shared[0] == shared[1]
    assert (shared[0]["ids"], shared[0]["sizes"]) == ([0, 1], [2, 3])
    assert (shared[0]["labels"], shared[0]["counts"]) == (["0", "1", "2"], [[0, 1, 1], [2, 0, 1]])
    kept = run_ranks(2, look_as_silo, False)[0]
    assert (kept["sizes"], kept["labels"], kept["counts"]) == ([2, 3], (), ())
