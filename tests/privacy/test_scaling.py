"""Private scaling: closed forms without noise, the bound of one contribution by brute force, and the noise."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from lightning_fl.privacy import PrivacyError, PrivateScaling, SecureNoise, scaling
from lightning_fl.privacy.scaling import MIN_STD

RANGES = {"age": (0.0, 120.0), "income": (-1e4, 3e4)}


def table(num_rows: int = 400, num_clients: int = 20, seed: int = 0) -> tuple[dict[str, np.ndarray], np.ndarray]:
    rng = np.random.default_rng(seed)
    owners = np.sort(rng.integers(num_clients, size=num_rows))
    return {"age": rng.normal(40, 10, num_rows), "income": rng.normal(2e3, 4e3, num_rows)}, owners


@pytest.mark.parametrize("unit", ["example", "client"])
def test_without_noise_it_is_mean_and_deviation(unit: Any) -> None:
    values, owners = table()
    numeric, release = PrivateScaling(RANGES, 0.0, unit).fit(values, owners)
    weights = np.ones(400) if unit == "example" else 1 / np.bincount(owners)[owners]
    for column, (mean, std) in numeric.items():
        expected = np.average(values[column], weights=weights)
        assert mean == pytest.approx(expected, rel=1e-9)
        assert std == pytest.approx(math.sqrt(np.average((values[column] - expected) ** 2, weights=weights)), rel=1e-9)
    assert (release.noise_multiplier, release.unit) == (0.0, unit)
    assert release.id != PrivateScaling(RANGES, 0.0, unit).fit(values, owners)[1].id


def total_of(unit: Any, values: Any, owners: Any, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """The sum to which noise is added."""
    seen = []
    monkeypatch.setattr(scaling, "add_noise", lambda flat, *_: seen.append(flat[torch.float64]) or flat)
    PrivateScaling(RANGES, 0.0, unit).fit(values, owners)
    return seen[0]


EXTREMES = [-1e308, -1e5, 0.0, 60.0, 1e5, 1e308, math.inf, -math.inf, math.nan]


@pytest.mark.parametrize("unit", ["example", "client"])
def test_no_contribution_moves_the_sum_by_more_than_the_sensitivity(unit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    values, owners = table()
    with_all = total_of(unit, values, owners, monkeypatch)
    bound = PrivateScaling(RANGES, 0.0, unit).sensitivity
    furthest = 0.0
    for age in EXTREMES:
        for income in EXTREMES:
            num_rows = 1 if unit == "example" else 50
            more = {
                "age": np.append(values["age"], np.full(num_rows, age)),
                "income": np.append(values["income"], np.full(num_rows, income)),
            }
            moved = total_of(unit, more, np.append(owners, np.full(num_rows, 20)), monkeypatch) - with_all
            furthest = max(furthest, float(moved.norm()))
    assert 0.999 * bound < furthest <= bound * (1 + 1e-12)


def test_a_client_moves_a_sum_that_protects_examples_by_more(monkeypatch: pytest.MonkeyPatch) -> None:
    values, owners = table()
    moved = total_of("example", values, owners, monkeypatch) - total_of(
        "example", {name: column[owners > 0] for name, column in values.items()}, owners[owners > 0], monkeypatch
    )
    assert moved.norm() > 5 * PrivateScaling(RANGES, 0.0, "example").sensitivity


def test_the_noise_has_the_recorded_deviation(monkeypatch: pytest.MonkeyPatch) -> None:
    values, owners = table()
    exact = total_of("client", values, owners, monkeypatch)
    monkeypatch.undo()
    seen = []
    check = scaling.check_added
    monkeypatch.setattr(
        scaling, "check_added", lambda before, after, std: seen.append(after) or check(before, after, std)
    )
    private = PrivateScaling(RANGES, 3.0)
    for _ in range(2000):
        private.fit(values, owners)
    noise = torch.stack([flat[torch.float64] for flat in seen]) - exact
    expected = 3.0 * math.sqrt(5)
    assert abs(noise.std() / expected - 1) < 4 / math.sqrt(2 * noise.numel())
    assert abs(noise.mean()) < 4 * expected / math.sqrt(noise.numel())


def test_much_noise_gives_a_scaling_that_can_be_used() -> None:
    values, owners = table()
    for _ in range(50):
        for column, (mean, std) in PrivateScaling(RANGES, 1e3).fit(values, owners)[0].items():
            low, high = RANGES[column]
            assert low <= mean <= high
            assert MIN_STD * (high - low) / 2 * 0.999 <= std <= (high - low) / 2 * 1.001


def test_noise_of_a_broken_source_stops_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SecureNoise, "normal", lambda self, size, std=1.0: torch.zeros(size, dtype=torch.float64))
    with pytest.raises(PrivacyError):
        PrivateScaling(RANGES, 1.0).fit(*table())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranges": {}}, "no ranges"),
        ({"ranges": {"age": (3.0, 3.0)}}, "low < high"),
        ({"ranges": {"age": (0.0, math.inf)}}, "low < high"),
        ({"ranges": {"age": (math.nan, 1.0)}}, "low < high"),
        ({"noise_multiplier": -1.0}, "noise_multiplier"),
        ({"unit": "row"}, "'client' or 'example'"),
    ],
)
def test_wrong_arguments_are_refused(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PrivateScaling(**{"ranges": RANGES, "noise_multiplier": 1.0, **options})
