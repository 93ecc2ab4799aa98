from __future__ import annotations

from itertools import chain
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from lightning_fl.data.partitioners.label_skew import Dirichlet, LabelsPerClient, Shards
from lightning_fl.data.partitioners.natural import NaturalColumn
from lightning_fl.data.targets import column, label_groups, targets


class Items(Dataset):
    def __init__(self, items: list, **attributes: object) -> None:
        self.items = items
        self.__dict__.update(attributes)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> object:
        return self.items[index]


def numbers(values: object) -> TensorDataset:
    values = torch.as_tensor(values)
    return TensorDataset(torch.zeros(len(values), 1), values)


def test_regression_targets_are_cut_at_their_quantiles() -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    groups = label_groups(numbers(values), num_bins=4)
    assert np.bincount(groups).tolist() == [250] * 4
    highest = [values.numpy()[groups == group].max() for group in range(4)]
    assert highest == sorted(highest)


def test_regression_targets_with_few_values_are_groups_as_they_are() -> None:
    assert label_groups(numbers([0.5, 2.0, 0.5, 1.0])).tolist() == [0, 2, 0, 1]


def test_a_column_of_targets_is_as_good_as_a_row() -> None:
    assert targets(numbers([[1], [2]])).tolist() == [1, 2]


def test_the_group_of_several_labels_is_the_rarest() -> None:
    rows = [[1, 1, 0], [1, 0, 0], [1, 0, 1], [0, 0, 0], [1, 1, 0]]
    groups = label_groups(numbers(rows))
    assert groups.tolist() == [2, 1, 3, 0, 2]  # label 1 is rarer than 0, label 2 the rarest; none is its own group
    assert targets(numbers(rows)).dtype == np.bool_


@pytest.mark.parametrize(
    "values",
    [torch.randn(600), torch.randint(0, 2, (600, 5)), torch.randint(0, 2, (600, 5)).float()],
    ids=["regression", "multi-label", "multi-label floats"],
)
def test_label_skew_works_for_any_kind_of_target(values: torch.Tensor) -> None:
    dataset = numbers(values)
    for partitioner in (Dirichlet(0.3), Dirichlet(0.3, per="client"), LabelsPerClient(2)):
        parts = partitioner(dataset, 12)
        assert torch.equal(torch.cat(parts).sort().values, torch.arange(600))
    groups = label_groups(dataset)
    assert {len(np.unique(groups[part])) for part in parts} == {2}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_targets_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="1 of the 3 targets of TensorDataset are NaN or infinite"):
        targets(numbers([0.5, bad, 1.5]))


@pytest.mark.parametrize(
    ("dataset", "name"),
    [
        (Items([0, 1, 2], writer=["b", "a", "b"]), "writer"),
        (Items([0, 1, 2], writer=np.array(["b", "a", "b"], dtype=object)), "writer"),
        (Items([{"x": 0, "who": "b"}, {"x": 0, "who": "a"}, {"x": 0, "who": "b"}]), "who"),
        (Items([(0, "b", 1), (0, "a", 1), (0, "b", 1)]), 1),
        (Subset(Items([0, 1, 2, 3], writer=["a", "b", "a", "b"]), [1, 2, 3]), "writer"),
        (ConcatDataset([Items([0], writer=["b"]), Items([0, 1], writer=["a", "b"])]), "writer"),
    ],
)
def test_columns_are_found(dataset: Dataset, name: str | int) -> None:
    assert column(dataset, name).tolist() == ["b", "a", "b"]


def test_a_column_of_a_tensor_dataset_is_a_tensor() -> None:
    dataset = TensorDataset(torch.zeros(3), torch.tensor([7, 8, 7]), torch.zeros(3))
    assert column(dataset, 1).tolist() == [7, 8, 7]


def test_a_column_of_hugging_face_is_read_at_once() -> None:
    class Rows:
        column_names = ("site",)

        def __len__(self) -> int:
            return 2

        def __getitem__(self, key: object) -> object:
            assert key == "site", "a row was read"
            return ["x", "y"]

    assert column(Rows(), "site").tolist() == ["x", "y"]


@pytest.mark.parametrize("dataset", [Items([{"x": 0}]), Items([(0,)]), Items([SimpleNamespace(x=1)])])
def test_a_missing_column_is_refused(dataset: Dataset) -> None:
    with pytest.raises(ValueError, match="has no column 'who'"):
        column(dataset, "who")


def test_a_column_of_numbers_with_fractions_names_nobody() -> None:
    with pytest.raises(ValueError, match="expected one integer or string per sample"):
        column(Items([0, 1], who=[0.5, 1.5]), "who")


class OfGraphs:
    """A data set of graphs as PyG has them: the label is an attribute of the sample."""

    def __init__(self, labels: list[int], sites: list[str]) -> None:
        self.labels_of_graphs, self.sites = labels, sites

    def __len__(self) -> int:
        return len(self.labels_of_graphs)

    def __getitem__(self, index: int) -> SimpleNamespace:
        return SimpleNamespace(y=torch.tensor([self.labels_of_graphs[index]]), site=self.sites[index])


GRAPHS = OfGraphs([0, 1, 1, 0], ["north", "south", "north", "north"])


@pytest.mark.parametrize("key", ["y", "target", "label", "labels", "targets"])
def test_targets_are_found_as_attribute_or_entry(key: str) -> None:
    assert targets(Items([{key: label} for label in (0, 1, 1, 0)])).tolist() == [0, 1, 1, 0]
    assert targets(Items([SimpleNamespace(**{key: torch.tensor([v])}) for v in (0, 1)])).tolist() == [0, 1]
    stored = Items([None] * 3)
    setattr(stored, key, torch.tensor([2, 0, 1]))
    assert targets(stored).tolist() == [2, 0, 1]


@pytest.mark.parametrize(
    "name", ["site", lambda graph: graph.site, np.array(GRAPHS.sites), GRAPHS.sites], ids=["name", "f", "array", "list"]
)
def test_a_natural_column_is_a_name_a_function_or_the_values(name: Any) -> None:
    partitioner = NaturalColumn(name)
    assert partitioner.client_ids(GRAPHS) == ["north", "south"]
    assert [part.tolist() for part in partitioner(GRAPHS)] == [[0, 2, 3], [1]]


def test_values_that_do_not_fit_the_data_set_are_refused() -> None:
    with pytest.raises(ValueError, match="3 values for the 4 samples"):
        NaturalColumn(["a", "b", "c"])(GRAPHS)
    with pytest.raises(ValueError, match="The column of OfGraphs is float64"):
        NaturalColumn(lambda graph: 0.5)(GRAPHS)


def test_a_split_by_label_takes_the_labels_of_graphs() -> None:
    parts = Dirichlet(0.3)(GRAPHS, 2)
    assert sorted(chain.from_iterable(part.tolist() for part in parts)) == [0, 1, 2, 3]


@pytest.mark.parametrize("partitioner", [LabelsPerClient(2), Dirichlet(0.5), Shards(2)], ids=str)
def test_integers_to_predict_are_not_taken_for_labels(partitioner: Any) -> None:
    values = torch.arange(200).repeat_interleave(2)
    with pytest.raises(ValueError, match="are 200 different integers for 400 samples, so they look like numbers"):
        partitioner.split(numbers(values), 10, np.random.default_rng(0))
    parts = partitioner.split(numbers(values.float()), 10, np.random.default_rng(0))
    assert sum(map(len, parts)) == 400
    assert len(np.unique(label_groups(numbers(values.float()), num_bins=150))) == 150
    many_classes = numbers(torch.arange(62).repeat_interleave(5))
    assert len(np.unique(label_groups(many_classes))) == 62
