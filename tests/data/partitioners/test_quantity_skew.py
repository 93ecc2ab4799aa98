from __future__ import annotations

import math

import numpy as np
import pytest

from lightning_fl.data.partitioners.partitioner import Partitioner
from lightning_fl.data.partitioners.quantity_skew import DirichletSizes, LognormalSizes


def sizes(partitioner: Partitioner, num_samples: int, num_clients: int, seed: int = 0) -> np.ndarray:
    return np.array([len(part) for part in partitioner(range(num_samples), num_clients, seed)])


@pytest.mark.parametrize("alpha", [0.5, 1.0, 10.0])
def test_dirichlet_shares_concentrate_as_the_mathematics_says(alpha: float) -> None:
    drawn = [((sizes(DirichletSizes(alpha, min_size=0), 20_000, 10, seed) / 2e4) ** 2).sum() for seed in range(200)]
    assert abs(np.mean(drawn) - (alpha + 1) / (10 * alpha + 1)) < 4 * np.std(drawn) / math.sqrt(200)


def test_lognormal_sizes_have_the_spread_asked_for() -> None:
    logs = np.log(sizes(LognormalSizes(1.0, min_size=0), 1_000_000, 1000))
    assert abs(logs.std() - 1.0) < 4 / math.sqrt(2 * 1000)


@pytest.mark.parametrize("partitioner", [DirichletSizes(0.01, min_size=5), LognormalSizes(5.0, min_size=5)], ids=str)
def test_a_smallest_size_is_kept_and_the_samples_are_random(partitioner: Partitioner) -> None:
    parts = partitioner(range(1000), 100)
    assert min(map(len, parts)) >= 5
    largest = max(parts, key=len).numpy()
    assert (np.diff(largest) != 1).mean() > 0.1


@pytest.mark.parametrize("partitioner", [DirichletSizes(1.0, min_size=11), LognormalSizes(1.0, min_size=11)], ids=str)
def test_a_smallest_size_that_cannot_be_met_is_refused(partitioner: Partitioner) -> None:
    with pytest.raises(ValueError, match="min_size=11 for 10 clients needs 110 samples, found 100"):
        partitioner(range(100), 10)


def test_no_spread_means_equal_sizes() -> None:
    assert set(sizes(LognormalSizes(0.0), 100, 10)) == {10}
