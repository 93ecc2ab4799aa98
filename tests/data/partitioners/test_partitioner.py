from __future__ import annotations

import math
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from lightning_fl.data.partitioners.label_skew import Dirichlet
from lightning_fl.data.partitioners.partitioner import IID, Partitioner
from lightning_fl.data.targets import targets


def labelled(num_per_class: int, num_classes: int = 10) -> TensorDataset:
    labels = torch.arange(num_classes).repeat(num_per_class)
    return TensorDataset(torch.zeros(len(labels), 1), labels)


def class_counts(dataset: TensorDataset, parts: list[torch.Tensor]) -> np.ndarray:
    labels = dataset.tensors[-1]
    num_classes = int(labels.max()) + 1
    return np.stack([np.bincount(labels[part].numpy(), minlength=num_classes) for part in parts])


@pytest.mark.parametrize(("num_samples", "num_clients"), [(100, 10), (101, 10), (10, 10), (7, 2)])
def test_iid_sizes_differ_by_at_most_one(num_samples: int, num_clients: int) -> None:
    sizes = [len(part) for part in IID()(range(num_samples), num_clients)]
    assert max(sizes) - min(sizes) == (0 if num_samples % num_clients == 0 else 1)


@pytest.mark.parametrize("alpha", [0.1, 0.5, 1.0, 10.0, 100.0])
@pytest.mark.spread(1)
def test_dirichlet_per_class_concentrates_as_the_mathematics_says(alpha: float) -> None:
    dataset, num_clients = labelled(2000), 10
    concentration = []
    for seed in range(200):
        counts = class_counts(dataset, Dirichlet(alpha, min_size=0)(dataset, num_clients, seed))
        concentration.append(((counts / 2000) ** 2).sum(axis=0).mean())
    expected = (alpha + 1) / (num_clients * alpha + 1)
    assert abs(np.mean(concentration) - expected) < 4 * np.std(concentration) / math.sqrt(200)


@pytest.mark.parametrize("alpha", [0.1, 1.0, 10.0, 100.0])
@pytest.mark.spread(1)
def test_dirichlet_per_client_concentrates_as_the_mathematics_says(alpha: float) -> None:
    dataset = labelled(2000)
    concentration = []
    for seed in range(200):
        first = Dirichlet(alpha, per="client")(dataset, 10, seed)[0]
        concentration.append(((class_counts(dataset, [first]) / 2000) ** 2).sum())
    expected = (alpha / 10 + 1) / (alpha + 1)
    assert abs(np.mean(concentration) - expected) < 4 * np.std(concentration) / math.sqrt(200)


def test_tiny_alpha_gives_a_client_nearly_one_class() -> None:
    dataset = labelled(1000)
    counts = class_counts(dataset, Dirichlet(1e-3, per="client")(dataset, 10))
    assert (counts.max(axis=1) / counts.sum(axis=1) > 0.95).all()


@pytest.mark.parametrize("per", ["class", "client"])
def test_huge_alpha_gives_every_client_the_global_mix(per: str) -> None:
    dataset = labelled(1000)
    counts = class_counts(dataset, Dirichlet(1e8, per=per)(dataset, 10))
    shares = counts / counts.sum(axis=1, keepdims=True)
    assert (abs(shares - 0.1) < 3 * math.sqrt(0.1 * 0.9 / 1000)).all()


@pytest.mark.parametrize("alpha", [1e-300, 1e-10, 1e300])
@pytest.mark.parametrize("per", ["class", "client"])
def test_extreme_alpha_still_uses_every_sample_once(per: str, alpha: float) -> None:
    parts = Dirichlet(alpha, per=per, min_size=0)(labelled(20), 7)
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(200))


def test_dirichlet_per_client_gives_equal_sizes() -> None:
    sizes = {len(part) for part in Dirichlet(0.1, per="client")(labelled(100), 7)}
    assert sizes == {142, 143}


def test_dirichlet_per_client_rounds_without_bias() -> None:
    dataset = labelled(3)
    counts = sum(class_counts(dataset, Dirichlet(1e8, per="client")(dataset, 10, seed)[:1]) for seed in range(1000))
    assert (abs(counts / 1000 - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 1000)).all()


def test_dirichlet_per_client_combines_any_classes_in_a_tiny_client() -> None:
    dataset = labelled(3)
    pairs = {
        tuple(targets(dataset)[Dirichlet(1e8, per="client")(dataset, 15, seed)[0]].tolist()) for seed in range(1000)
    }
    assert len({frozenset(pair) for pair in pairs}) == 45


def test_dirichlet_default_is_practicable_for_small_data() -> None:
    dataset = labelled(143)
    for seed in range(20):
        assert min(len(part) for part in Dirichlet(0.3)(dataset, 10, seed)) >= 1


def test_min_size_is_honoured() -> None:
    dataset = labelled(100)
    assert min(len(part) for part in Dirichlet(0.3, min_size=0)(dataset, 10)) < 60
    assert min(len(part) for part in Dirichlet(0.3, min_size=60, max_tries=1000)(dataset, 10)) >= 60


def test_min_size_that_no_draw_meets_is_refused() -> None:
    message = r"In 5 draws of Dirichlet\(alpha=0.01.*at least 20\. Use a larger alpha, fewer clients or a smaller"
    with pytest.raises(ValueError, match=message):
        Dirichlet(0.01, min_size=20, max_tries=5)(labelled(100), 50)


@pytest.mark.parametrize("per", ["class", "client"])
def test_min_size_beyond_the_data_is_refused(per: str) -> None:
    with pytest.raises(ValueError, match=r"needs 1010 samples, found 1000\. Use fewer clients"):
        Dirichlet(1.0, per=per, min_size=101)(labelled(100), 10)


class Items(Dataset):
    def __init__(self, items: list) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> object:
        return self.items[index]


class Attribute(Items):
    def __init__(self, name: str, values: object) -> None:
        super().__init__([(0.0, -1)] * 3)
        setattr(self, name, values)


X = torch.zeros(3, 2)
Y = torch.tensor([2, 0, 1])


@pytest.mark.parametrize(
    "dataset",
    [
        TensorDataset(X, Y),
        Attribute("targets", [2, 0, 1]),
        Attribute("targets", Y),
        Attribute("labels", np.array([2, 0, 1], dtype=np.uint8)),
        Subset(TensorDataset(torch.zeros(5, 2), torch.tensor([1, 9, 0, 9, 2])), [4, 2, 0]),
        Subset(Subset(Attribute("targets", [0, 1, 2]), torch.tensor([2, 1, 0])), [0, 2, 1]),
        ConcatDataset([TensorDataset(X[:1], Y[:1]), TensorDataset(X[1:], Y[1:])]),
        ConcatDataset([TensorDataset(X[:1], Y[:1]), Items([(0.0, 0), (0.0, 1)])]),
        Items([(0.0, 2), (0.0, 0), (0.0, 1)]),
        Items([(0.0, torch.tensor(2)), (0.0, torch.tensor(0)), (0.0, torch.tensor(1))]),
        Items([{"x": 0.0, "label": 2}, {"x": 0.0, "label": 0}, {"x": 0.0, "label": 1}]),
        Items([{"x": 0.0, "target": np.int64(2)}, {"x": 0.0, "target": 0}, {"x": 0.0, "target": 1}]),
        Subset(Items([(0.0, 1), (0.0, 0), (0.0, 2)]), [2, 1, 0]),
    ],
)
def test_targets_are_found(dataset: Dataset) -> None:
    labels = targets(dataset)
    assert labels.dtype == np.int64
    assert labels.tolist() == [2, 0, 1]


def test_targets_skips_an_attribute_of_another_length() -> None:
    assert targets(Attribute("labels", ["cat", "dog"])).tolist() == [-1, -1, -1]


@pytest.mark.parametrize(
    "dataset",
    [
        TensorDataset(X, torch.full((3, 2), 2)),
        Items([(0.0, "cat"), (0.0, "dog")]),
        Items([(0.0, [1]), (0.0, [1, 2])]),
    ],
)
def test_targets_that_are_no_class_labels_are_refused(dataset: Dataset) -> None:
    with pytest.raises(ValueError, match=r"needs .* a class label .* data with other targets with IID\(\)"):
        Dirichlet(0.3)(dataset, 2)


@pytest.mark.parametrize("sample", [torch.zeros(2), {"x": 0.0}, (1,), SimpleNamespace(y=1)])
def test_samples_without_a_label_are_refused(sample: object) -> None:
    with pytest.raises(ValueError, match=r"has no label.*Split data without labels with IID\(\)"):
        Dirichlet(0.3)(Items([sample] * 3), 2)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([[0, 1], [2]], "1 of 4 samples to no client, 0 more than once, and 0 that do not exist"),
        ([[0, 1, 2, 3], [3]], "0 of 4 samples to no client, 1 more than once"),
        ([[0, 1, 2, 3], [4]], "and 1 that do not exist"),
    ],
)
def test_a_partitioner_of_the_user_must_give_every_sample_to_one_client(parts: list[list[int]], message: str) -> None:
    class Own(Partitioner):
        def split(self, dataset: object, num_clients: int, rng: np.random.Generator) -> list[np.ndarray]:
            return [np.array(part) for part in parts]

    with pytest.raises(ValueError, match=message):
        Own()(range(4), 2)


def test_a_draw_that_cannot_succeed_ends_soon() -> None:
    start = time.process_time()
    with pytest.raises(ValueError, match=r"In 100 draws .* at most 0 samples, expected at least 1"):
        Dirichlet(0.3)(labelled(6000), 10_000)
    assert time.process_time() - start < 10
