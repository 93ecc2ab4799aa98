from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from lightning_fl.data.partitioners.label_skew import LabelsPerClient, Shards


def labelled(num_per_class: int, num_classes: int = 10) -> TensorDataset:
    labels = torch.arange(num_classes).repeat(num_per_class)
    return TensorDataset(torch.zeros(len(labels), 1), labels)


def labels_of(dataset: TensorDataset, parts: list[torch.Tensor]) -> list[int]:
    return [len(dataset.tensors[1][part].unique()) for part in parts]


def test_two_hundred_shards_of_three_hundred_give_one_to_four_labels_mostly_two() -> None:
    dataset = labelled(6000)
    for seed in range(5):
        parts = Shards(2)(dataset, 100, seed)
        numbers = np.array(labels_of(dataset, parts))
        assert set(map(len, parts)) == {600}
        assert numbers.min() >= 1
        assert numbers.max() <= 4
        assert np.median(numbers) == 2


def test_as_many_shards_as_labels_divide_the_data_without_a_remainder_lost() -> None:
    parts = Shards(3)(labelled(7), 7)
    assert sum(map(len, parts)) == 70
    assert max(map(len, parts)) - min(map(len, parts)) <= 3


def test_more_shards_than_samples_are_refused() -> None:
    with pytest.raises(ValueError, match=r"10 clients with 3 shards each need 30 shards, but .* only 20 samples"):
        Shards(3)(labelled(2), 10)


@pytest.mark.parametrize("num_labels", [1, 2, 3, 10])
@pytest.mark.parametrize("sigma", [0.0, 2.0])
def test_every_client_has_exactly_k_labels_and_every_sample_is_used(num_labels: int, sigma: float) -> None:
    dataset = labelled(500)
    parts = LabelsPerClient(num_labels, sigma=sigma)(dataset, 50)
    assert labels_of(dataset, parts) == [num_labels] * 50
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(5000))


def test_labels_have_equally_many_holders() -> None:
    dataset = labelled(500)
    holders = np.zeros(10, dtype=int)
    for part in LabelsPerClient(3)(dataset, 50):
        holders[dataset.tensors[1][part].unique().numpy()] += 1
    assert holders.tolist() == [15] * 10


def test_equal_sizes_without_sigma_and_a_power_law_with_it() -> None:
    dataset = labelled(6000)
    equal = [len(part) for part in LabelsPerClient(2)(dataset, 100)]
    skewed = np.array([len(part) for part in LabelsPerClient(2, sigma=2.0, min_per_label=5)(dataset, 1000)])
    assert set(equal) == {600}
    assert skewed.min() >= 10
    assert np.median(skewed) < skewed.mean() / 2
    assert skewed.max() > 10 * skewed.mean()


@pytest.mark.parametrize(("num_labels", "num_clients"), [(11, 5), (1, 9)])
def test_labels_that_do_not_fit_are_refused(num_labels: int, num_clients: int) -> None:
    with pytest.raises(ValueError, match=f"{num_clients} clients with num_labels={num_labels} do not fit data with 10"):
        LabelsPerClient(num_labels)(labelled(5), num_clients)


def test_too_few_samples_of_a_label_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Label \d has 5 samples, but its 6 clients need min_per_label=1 each"):
        LabelsPerClient(2)(labelled(5), 30)


def test_sizes_that_overflow_still_divide_all_samples() -> None:
    for seed in range(5):
        parts = LabelsPerClient(2, sigma=1000.0)(labelled(50), 10, seed=seed)
        assert torch.equal(torch.cat(parts).sort().values, torch.arange(500))
