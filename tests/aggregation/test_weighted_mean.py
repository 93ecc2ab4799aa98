from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from lightning_fl.aggregation import RoundContext, WeightedMean
from lightning_fl.tree import is_finite, scale, tree_map
from lightning_fl.types import Update
from tests.helpers.federation import aggregate, random_updates

CPU = torch.device("cpu")
CTX = RoundContext(round=3, cohort=["a"], population=10)

RunRanks = Callable[..., list[Any]]


def update(*values: float, weight: float = 1.0, dtype: torch.dtype = torch.float64) -> Update:
    return Update({"w": torch.tensor(values, dtype=dtype)}, weight=weight)


@pytest.mark.parametrize("factor", [1e-3, 1.0, 1e3])
def test_only_the_ratio_of_weights_counts(factor: float) -> None:
    updates = random_updates(3)
    scaled = [replace(update, weight=factor * update.weight) for update in updates]
    torch.testing.assert_close(aggregate(scaled).mean(), aggregate(updates).mean())


def test_no_update_at_all_is_refused() -> None:
    aggregator = WeightedMean()
    with pytest.raises(ValueError, match=r"round 3 add up to 0\.0 over 0 updates"):
        aggregator.result(aggregator.init(update(1), CPU), CTX)


def test_a_client_without_examples_changes_nothing() -> None:
    updates = random_updates(3)
    empty = replace(updates[0], weight=0.0, aux={"control": tree_map(torch.zeros_like, updates[0].aux["control"])})
    torch.testing.assert_close(aggregate([*updates, empty]).mean(), aggregate(updates).mean(), rtol=0, atol=0)


def test_integer_buffers_are_summed_without_rounding() -> None:
    result = aggregate([Update({}, {"count": torch.tensor([value])}, weight) for value, weight in ((1, 1.0), (2, 2.5))])
    assert result.buffers["count"].tolist() == [6.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("step", [0.0, 0.1])
def test_the_same_model_from_every_client_stays_to_one_ulp(step: float, dtype: torch.dtype) -> None:
    start, direction = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0), dtype=dtype)
    delta = step * start * direction.sigmoid()
    model = start + delta
    mean = start + aggregate([Update({"w": delta}, weight=float(weight)) for weight in (1, 7, 30, 600)]).mean()["w"]
    one_ulp = torch.nextafter(model.abs(), torch.full_like(model, torch.inf)) - model.abs()
    assert bool(((mean - model).abs() <= one_ulp * (step > 0)).all())


@pytest.mark.parametrize(("a", "b"), [(2.0, 0.0), (1.0, 5.0), (-0.5, 3.0)])
def test_the_mean_is_linear(a: float, b: float) -> None:
    updates = random_updates(4)
    mapped = [replace(u, delta=tree_map(lambda delta: a * delta + b, u.delta)) for u in updates]
    expected = tree_map(lambda mean: a * mean + b, aggregate(updates).mean())
    torch.testing.assert_close(aggregate(mapped).mean(), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_updates_are_summed_in_float32(dtype: torch.dtype) -> None:
    value = torch.tensor([1.0001, 0.1], dtype=dtype)
    mean = aggregate([Update({"w": value})] * 1000).mean()["w"]
    torch.testing.assert_close(mean, value.float(), rtol=1e-5, atol=0)
    naive = sum([value] * 1000, torch.zeros_like(value)) / 1000
    assert not torch.allclose(naive.float(), value.float(), rtol=1e-2), "a sum in half precision would drift"


def test_one_nan_reaches_the_mean_unless_it_is_refused_before() -> None:
    assert not is_finite(aggregate([update(1), update(float("nan"))]).mean().values())


@pytest.mark.parametrize("sizes", [(2, 3), (1, 4), (5,)])
def test_a_mean_of_weighted_means_is_the_flat_mean(sizes: tuple[int, ...]) -> None:
    updates, flat = iter(random_updates(5)), aggregate(random_updates(5))
    regions = [aggregate([next(updates) for _ in range(size)]) for size in sizes]
    means = [Update(r.mean(), scale(r.buffers, 1 / r.weight), r.weight, r.aux) for r in regions]
    torch.testing.assert_close([aggregate(means).mean(), aggregate(means).buffers], [flat.mean(), flat.buffers])
