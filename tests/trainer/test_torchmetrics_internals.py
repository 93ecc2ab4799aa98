"""What torchmetrics_internals.py and metric_states.py rely on; a failure here means that torchmetrics has changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchmetrics
from packaging.version import Version
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat, dim_zero_max, dim_zero_mean, dim_zero_min, dim_zero_sum

from lightning_fl.strategies.torchmetrics_internals import is_list_state, reductions, set_states

REDUCTIONS = {
    "sum": dim_zero_sum,
    "mean": dim_zero_mean,
    "cat": dim_zero_cat,
    "min": dim_zero_min,
    "max": dim_zero_max,
    "none": None,
}


class Seen(Metric):
    """One state for each reduction, all with the values seen."""

    def __init__(self) -> None:
        super().__init__()
        for name in REDUCTIONS:
            default: Any = [] if name == "cat" else torch.tensor(0.0)
            self.add_state(name, default, dist_reduce_fx=None if name == "none" else name)

    def update(self, value: float) -> None:
        self.sum += value
        self.cat.append(torch.tensor([value]))

    def compute(self) -> torch.Tensor:
        return self.sum + dim_zero_cat(self.cat).sum()


def test_the_version_is_supported() -> None:
    assert Version("1.4") <= Version(torchmetrics.__version__) < Version("2")


def test_states_are_reduced_by_the_functions_of_their_names() -> None:
    assert dict(reductions(Seen())) == REDUCTIONS


def test_a_state_declared_as_a_list_stays_one_when_it_is_concatenated() -> None:
    metric = Seen()
    assert [name for name in REDUCTIONS if is_list_state(metric, name)] == ["cat"]
    metric.cat = torch.zeros(3)
    assert is_list_state(metric, "cat")


def test_states_and_updates_are_read() -> None:
    metric = Seen()
    assert metric.update_count == 0
    metric.update(2.0)
    metric(3.0)
    assert metric.update_count == 2
    assert metric.metric_state.keys() == REDUCTIONS.keys()
    assert metric.metric_state["sum"] is metric.sum
    assert metric.metric_state["cat"] is metric.cat


def test_states_that_are_set_are_computed_with() -> None:
    metric = Seen()
    metric.update(2.0)
    assert metric.compute() == 4
    set_states(metric, {"sum": torch.tensor(10.0), "cat": [torch.tensor([1.0])]}, num_updates=7)
    assert metric.update_count == 7
    assert metric.compute() == 11
    metric.update(1.0)
    assert metric.update_count == 8
    assert metric.compute() == 13


def test_without_updates_compute_warns() -> None:
    metric = Seen()
    metric.update(1.0)
    set_states(metric, {"cat": [torch.tensor([1.0])]}, num_updates=0)
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        metric.compute()
