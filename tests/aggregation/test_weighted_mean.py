from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_fl.aggregation import RoundContext, Transform, WeightedMean
from lightning_fl.communication import LocalGroup, Message
from lightning_fl.tree import is_finite, scale, tree_map
from lightning_fl.types import Update
from tests.helpers.federation import aggregate, join_ranks

CPU = torch.device("cpu")
CTX = RoundContext(round=3, cohort=["a"], population=10)

RunRanks = Callable[..., list[Any]]


def update(*values: float, weight: float = 1.0, dtype: torch.dtype = torch.float64) -> Update:
    return Update({"w": torch.tensor(values, dtype=dtype)}, weight=weight)


def random_updates(num_clients: int, dtype: torch.dtype = torch.float64) -> list[Update]:
    """Updates with two dtypes, buffers and a side channel."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return [
        Update(
            delta={"a": draw(3, 2), "b": draw(4, dtype=torch.float32)},
            buffers={"mean": draw(3), "count": draw(1).mul(10).round().long()},
            weight=float(client + 1),
            aux={"control": {"a": draw(3, 2), "b": draw(4, dtype=torch.float32)}},
        )
        for client in range(num_clients)
    ]


def test_the_mean_is_weighted() -> None:
    updates = [update(1, 2, weight=1), update(3, 4, weight=3), update(10, -1, weight=6)]
    torch.testing.assert_close(aggregate(updates).mean()["w"], torch.tensor([7.0, 0.8], dtype=torch.float64))


@pytest.mark.parametrize("factor", [1e-3, 1.0, 1e3])
def test_only_the_ratio_of_weights_counts(factor: float) -> None:
    updates = random_updates(3)
    scaled = [replace(update, weight=factor * update.weight) for update in updates]
    torch.testing.assert_close(aggregate(scaled).mean(), aggregate(updates).mean())


@pytest.mark.parametrize("weights", [(0.0,), (0.0, 0.0), (float("nan"), 1.0)])
def test_weights_that_add_up_to_nothing_are_refused(weights: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"weights of round 0 add up to .*weighting='uniform'"):
        aggregate([update(1, weight=weight) for weight in weights])


def test_no_update_at_all_is_refused() -> None:
    aggregator = WeightedMean()
    with pytest.raises(ValueError, match=r"round 3 add up to 0\.0 over 0 updates"):
        aggregator.result(aggregator.init(update(1), CPU), CTX)


def test_a_client_without_examples_changes_nothing() -> None:
    updates = random_updates(3)
    empty = replace(updates[0], weight=0.0, aux={"control": tree_map(torch.zeros_like, updates[0].aux["control"])})
    torch.testing.assert_close(aggregate([*updates, empty]).mean(), aggregate(updates).mean(), rtol=0, atol=0)


def test_buffers_are_weighted_and_side_channels_are_not() -> None:
    updates = random_updates(5)
    result = aggregate(updates, population=10)
    for name in ("mean", "count"):
        expected = sum(update.weight * update.buffers[name] for update in updates)
        torch.testing.assert_close(result.buffers[name], expected.to(result.buffers[name].dtype))
    for name in ("a", "b"):
        torch.testing.assert_close(result.aux["control"][name], sum(update.aux["control"][name] for update in updates))
    assert (result.weight, result.num_clients, result.population) == (15.0, 5, 10)


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


def test_dtypes_do_not_mix() -> None:
    result = aggregate(random_updates(2))
    assert {name: tensor.dtype for name, tensor in result.delta.items()} == {"a": torch.float64, "b": torch.float32}
    assert result.buffers["count"].dtype == torch.float64


def test_the_updates_stay_as_they_are() -> None:
    updates, copies = random_updates(2), random_updates(2)
    aggregate(updates)
    for own, copy in zip(updates, copies, strict=True):
        torch.testing.assert_close(
            [own.delta, own.buffers, own.aux], [copy.delta, copy.buffers, copy.aux], rtol=0, atol=0
        )


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (Update({"w": torch.zeros(3)}), r"delta 'w' has shape \(3,\), expected \(1,\)"),
        (Update({"v": torch.zeros(1)}), r"delta 'w' has shape none \(missing\)"),
        (Update({"w": torch.zeros(1)}, {"mean": torch.zeros(1)}), r"buffers 'mean' .* expected no such tensor"),
        (Update({"w": torch.zeros(1)}, aux={"c": {"w": torch.zeros(1)}}), r"aux/c 'w' .*Algorithm\.aux_like"),
    ],
)
def test_an_update_of_another_form_is_refused(wrong: Update, message: str) -> None:
    aggregator = WeightedMean()
    with pytest.raises(ValueError, match=message):
        aggregator.add(aggregator.init(update(1), CPU), wrong, CTX)


def join_shares(num_clients: int, order: list[int]) -> tuple[list, float, int]:
    """The aggregate when the clients arrive in this order, dealt to the ranks in turn; some ranks may get none."""
    group, aggregator, updates = join_ranks(), WeightedMean(), random_updates(num_clients)
    acc = aggregator.init(updates[0], CPU)
    for client in order[group.rank :: group.size]:
        acc = aggregator.add(acc, updates[client], CTX)
    acc, _ = aggregator.merge(acc, group, Message(), CTX)
    result = aggregator.result(acc, CTX)
    return [result.delta, result.buffers, dict(result.aux)], result.weight, result.num_clients


@pytest.mark.parametrize(("world_size", "num_clients"), [(1, 7), (2, 7), (4, 7), (4, 3)])
def test_ranks_and_order_of_arrival_do_not_matter(run_ranks: RunRanks, world_size: int, num_clients: int) -> None:
    expected = aggregate(random_updates(num_clients))
    order = torch.randperm(num_clients, generator=torch.Generator().manual_seed(world_size)).tolist()
    ranks = run_ranks(world_size, join_shares, num_clients, order)
    for trees, weight, count in ranks:
        assert (weight, count) == (expected.weight, num_clients)
        torch.testing.assert_close(trees, [expected.delta, expected.buffers, dict(expected.aux)])
        torch.testing.assert_close(trees, ranks[0][0], rtol=0, atol=0)


def test_reports_pass_through_the_merge() -> None:
    aggregator = WeightedMean()
    acc = aggregator.init(update(1), CPU)
    report = Message({"loss": 0.5}, {"confusion": torch.ones(2)})
    _, (received,) = aggregator.merge(acc, LocalGroup(), report, CTX)
    assert received.fields["loss"] == 0.5
    assert received.tensors["confusion"].tolist() == [1.0, 1.0]
    assert report.fields == {"loss": 0.5}


def test_merging_leaves_a_ranks_own_sums_to_try_again() -> None:
    aggregator = WeightedMean()
    acc = aggregator.add(aggregator.init(update(1), CPU), update(2, weight=3.0), CTX)
    first, _ = aggregator.merge(acc, LocalGroup(), Message(), CTX)
    aggregator.result(first, CTX).delta["w"].zero_()
    again, _ = aggregator.merge(acc, LocalGroup(), Message(), CTX)
    assert aggregator.result(again, CTX).delta["w"].tolist() == [6.0]


def test_one_nan_reaches_the_mean_unless_it_is_refused_before() -> None:
    assert not is_finite(aggregate([update(1), update(float("nan"))]).mean().values())


def test_a_plain_transform_changes_nothing() -> None:
    own, total, state = update(1), aggregate([update(1)]), {"norm": torch.ones(1)}
    assert Transform().client(own, state, CTX) == (own, state)
    assert Transform().server(total, state, CTX) == (total, state)


@pytest.mark.parametrize("sizes", [(2, 3), (1, 4), (5,)])
def test_a_mean_of_weighted_means_is_the_flat_mean(sizes: tuple[int, ...]) -> None:
    updates, flat = iter(random_updates(5)), aggregate(random_updates(5))
    regions = [aggregate([next(updates) for _ in range(size)]) for size in sizes]
    means = [Update(r.mean(), scale(r.buffers, 1 / r.weight), r.weight, r.aux) for r in regions]
    torch.testing.assert_close([aggregate(means).mean(), aggregate(means).buffers], [flat.mean(), flat.buffers])
