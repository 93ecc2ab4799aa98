"""Poisson batches: each example with the same probability, checked in such a way that other batches are found."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset, WeightedRandomSampler

from lightning_fl.privacy import Full, Poisson, PrivacyError
from lightning_fl.privacy.sample_level.poisson_loader import DrawCheck, PoissonBatches, PoissonLoader, check_sampler
from tests.helpers.training import images


def check_of(batches: list[Any], num_examples: int, rate: float) -> DrawCheck:
    check = DrawCheck()
    counts = np.bincount(np.concatenate([np.array(batch, dtype=np.int64) for batch in batches]), minlength=num_examples)
    check.add(counts, np.array([len(batch) for batch in batches]), rate)
    return check


def test_each_example_is_drawn_alike_and_independently() -> None:
    num_examples, rate, num_batches = 50, 0.2, 8000
    drawn = torch.zeros(num_batches, num_examples)
    for row, batch in zip(drawn, PoissonBatches(num_examples, rate, num_batches), strict=True):
        row[batch] = 1
    slack = 6 * (rate * (1 - rate) / num_batches) ** 0.5
    assert (drawn.mean(0) - rate).abs().max() < slack
    pairs = torch.corrcoef(drawn.T) - torch.eye(num_examples)
    assert pairs.abs().max() < 6 / num_batches**0.5
    over_time = torch.corrcoef(torch.stack([drawn[:-1].flatten(), drawn[1:].flatten()]))[0, 1]
    assert over_time.abs() < 6 / drawn.numel() ** 0.5


def test_batches_do_not_repeat_with_the_seed() -> None:
    passes = []
    for _ in range(2):
        torch.manual_seed(0)
        np.random.seed(0)
        passes.append(list(PoissonBatches(100, 0.5, 2)))
    assert passes[0] != passes[1]


@pytest.mark.parametrize(
    ("num_examples", "rate", "num_batches"), [(1, 1.0, 5), (3, 0.4, 3), (40, 0.01, 9), (500, 0.1, 1)]
)
def test_a_sound_sampler_is_never_suspected(num_examples: int, rate: float, num_batches: int) -> None:
    check = DrawCheck()
    for _ in range(300):
        batches = [np.array(batch, dtype=np.int64) for batch in PoissonBatches(num_examples, rate, num_batches)]
        counts = np.bincount(np.concatenate(batches), minlength=num_examples)
        check.add(counts, np.array([len(batch) for batch in batches]), rate)
        assert check.problem is None


def shuffled(num_examples: int, size: int) -> Iterator[np.ndarray]:
    order = np.random.default_rng(0).permutation(num_examples)
    yield from (order[start : start + size] for start in range(0, num_examples, size))


def test_other_batches_are_suspected() -> None:
    rng = np.random.default_rng(0)
    cases = {
        "each example is drawn": list(shuffled(1000, 100)),
        "the batches are": [rng.choice(1000, 100, replace=False) for _ in range(400)],
        "varies 10 times": [np.arange(100)] * 10,
        "were drawn": list(PoissonBatches(1000, 0.15, 10)),
    }
    for problem, batches in cases.items():
        found = check_of(batches, 1000, 0.1).problem
        assert found is not None
        assert problem in found


@pytest.mark.parametrize(
    "broken",
    [
        lambda self: iter([list(range(i, i + 100)) for i in range(0, 1000, 100)] * 30),
        lambda self: iter([list(range(0, 1000, 9))] * self.num_batches),
        lambda self: (np.flatnonzero(np.random.default_rng(i).random(1000) < 0.1).tolist() for i in range(300)),
    ],
)
def test_a_broken_sampler_stops_the_run_before_it_starts(monkeypatch: pytest.MonkeyPatch, broken: Any) -> None:
    check_sampler()
    monkeypatch.setattr(PoissonBatches, "__iter__", broken)
    with pytest.raises(PrivacyError, match="not drawn by Poisson"):
        check_sampler()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_gives_what_it_says_it_draws(num_workers: int) -> None:
    data = TensorDataset(torch.arange(30), torch.arange(30.0)[:, None].expand(30, 2))
    drawn: list[np.ndarray] = []
    own = PoissonLoader(DataLoader(Subset(data, range(10, 30)), 3, num_workers=num_workers), drawn.append)
    assert (own.num_examples, len(own), own.rate, own.sampling) == (20, 7, 0.15, Poisson(0.15))
    assert own.expected_batch_size == pytest.approx(3)
    for _ in range(3):
        for x, y in own:
            assert x.tolist() == (drawn[-1] + 10).tolist()
            assert y.shape == (len(drawn[-1]), 2)
    assert len(drawn) == 21
    assert len({len(chosen) for chosen in drawn}) > 1


def test_an_empty_batch_has_the_form_of_the_others() -> None:
    def collate(examples: list[Any]) -> dict[str, Any]:
        return {
            "x": torch.stack([x for x, _ in examples]),
            "names": [str(int(y)) for _, y in examples],
            "kind": "train",
        }

    drawn: list[np.ndarray] = []
    own = PoissonLoader(DataLoader(images(5), 1, collate_fn=collate), drawn.append)
    batches = [batch for _ in range(40) for batch in own]
    empty = next(batch for batch, chosen in zip(batches, drawn, strict=True) if not len(chosen))
    assert empty["x"].shape == (0, 1, 4, 4)
    assert (empty["names"], empty["kind"]) == ([], "train")


def test_a_batch_as_large_as_the_data_holds_all_of_it() -> None:
    own = PoissonLoader(DataLoader(images(5), 8, drop_last=True), lambda chosen: None)
    assert (own.rate, own.sampling, len(own)) == (1.0, Full(), 1)
    assert [len(x) for x, _ in own] == [5]
    assert len(PoissonLoader(DataLoader(images(0), 8), lambda chosen: None)) == 0


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


@pytest.mark.parametrize(
    "loader",
    [
        [[torch.zeros(2)]],
        DataLoader(Stream()),
        DataLoader(images(4), batch_size=None),
        DataLoader(images(4), sampler=WeightedRandomSampler([1.0] * 4, 4)),
        DataLoader(images(4), batch_sampler=[[0, 1], [2, 3]]),
    ],
)
def test_loaders_that_cannot_be_drawn_from_are_refused(loader: Any) -> None:
    with pytest.raises(ValueError, match="sample-level privacy"):
        PoissonLoader(loader, lambda chosen: None)
