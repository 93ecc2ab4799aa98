"""Distributed noise: the bound after rounding by brute force, and the accounting against exact divergences."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import ndtr
from scipy.stats import skellam

from lightning_fl.privacy import Gaussian, Ledger
from lightning_fl.privacy.accounting.sampling import Distributed, Full
from lightning_fl.privacy.client_level import distributed
from lightning_fl.privacy.client_level.distributed import (
    ENCODED,
    ROUNDING_VARIANCE,
    Grid,
    encoded_like,
    gaussian_bound,
    gaussian_slack,
)
from lightning_fl.privacy.integer_noise import IntegerNoise
from lightning_fl.privacy.noise import PrivacyError
from lightning_fl.types import Update

GRID = Grid(clip=0.5, size=40, noise_multiplier=1.0, num_honest=4, mechanism="discrete_gaussian")


class Coarse(Grid):
    """A grid on which rounding matters."""

    levels = 4  # type: ignore[assignment]


def on_the_sphere(size: int, clip: float, kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(size)
    values = {
        "random": torch.randn(size, generator=generator, dtype=torch.float64),
        "even": torch.ones(size, dtype=torch.float64),
        "one": torch.eye(size, dtype=torch.float64)[0],
        "halves": torch.where(torch.arange(size) < 8, 3.5, 1e-3).double(),
        "zero": torch.zeros(size, dtype=torch.float64),
    }[kind]
    return values * (clip / values.norm()) if bool(values.any()) else values


@pytest.mark.parametrize("kind", ["random", "even", "one", "halves", "zero"])
@pytest.mark.parametrize("size", [1, 40, 3000])
def test_no_rounded_update_is_longer_than_the_bound(kind: str, size: int) -> None:
    for grid in (replace(GRID, size=size), Coarse(0.5, size, 1.0, 4, "discrete_gaussian")):
        values, noise = on_the_sphere(size, 0.5, kind), IntegerNoise()
        for _ in range(200):
            rounded = grid.round(values, noise)
            assert int(rounded.square().sum()) <= grid.max_square
            assert bool(((rounded - values / grid.step).abs() < 1).all())


def test_without_the_condition_some_would_be() -> None:
    grid = Coarse(0.5, 40, 1.0, 4, "discrete_gaussian")
    values = on_the_sphere(40, 0.5, "even") / grid.step
    up = values.floor() + (torch.rand(20_000, 40, dtype=torch.float64) < values - values.floor())
    assert bool((up.square().sum(1) > grid.max_square).any())


@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_rounding_of_small_updates(size: int) -> None:
    """The bound exceeds what most roundings reach: each attempt succeeds with more than the promised probability."""
    grid = Coarse(1.0, size, 1.0, 4, "discrete_gaussian")
    for direction in itertools.product(np.linspace(-1, 1, 9), repeat=size):
        if not any(direction):
            continue
        scaled = np.array(direction) / np.linalg.norm(direction) * grid.levels
        share = scaled - np.floor(scaled)
        within = 0.0
        for up in itertools.product((0, 1), repeat=size):
            chance = np.prod([own if bit else 1 - own for own, bit in zip(share, up, strict=True)])
            within += chance * (((np.floor(scaled) + up) ** 2).sum() <= grid.max_square)
        assert within >= 1 - math.exp(-0.5)


def test_rounding_keeps_the_mean() -> None:
    values = on_the_sphere(40, 0.3, "random")
    mean = torch.stack([GRID.round(values, IntegerNoise()) for _ in range(2000)]).double().mean(0)
    assert bool(((mean - values / GRID.step).abs() < 5 * 0.5 / 2000**0.5).all())


def test_a_longer_update_is_not_sent() -> None:
    with pytest.raises(PrivacyError, match="exceeded the norm bound"):
        GRID.round(on_the_sphere(40, 0.6, "random"), IntegerNoise())


@pytest.mark.parametrize("mechanism", ["discrete_gaussian", "skellam"])
def test_encoding_and_decoding_are_inverse_but_for_rounding_and_noise(mechanism: Any) -> None:
    delta = {"a": torch.randn(3, 4), "b": torch.tensor(0.3, dtype=torch.float64)}
    template = Update(delta, {"mean": torch.randn(5)}, 1.0, {"control": {"a": torch.randn(3, 4).bfloat16()}})
    grid = Grid(100.0, distributed.num_coordinates(template), 0.0, 3, mechanism)
    assert grid.size == 12 + 1 + 5 + 12
    encoded = grid.encode(template, IntegerNoise())
    assert encoded_like(template).delta[ENCODED].shape == encoded.delta[ENCODED].shape == (30,)
    trees = grid.decode(encoded.delta[ENCODED] * 3, template)
    assert {name: set(tree) for name, tree in trees.items()} == {
        "delta": {"a", "b"},
        "buffers": {"mean"},
        "aux/control": {"a"},
    }
    for tree, given in (
        ("delta", template.delta),
        ("buffers", template.buffers),
        ("aux/control", template.aux["control"]),
    ):
        for name, tensor in given.items():
            assert (trees[tree][name].double() / 3 - tensor.double()).abs().max() <= grid.step + 1e-6
    assert (trees["delta"]["a"].dtype, trees["delta"]["b"].dtype) == (torch.float32, torch.float64)


def test_the_template_knows_the_model_bit_for_bit() -> None:
    one, other = Update({"a": torch.zeros(3)}), Update({"a": torch.tensor([0.0, 1e-40, 0.0])})
    assert not torch.equal(encoded_like(one).delta[ENCODED], encoded_like(other).delta[ENCODED])


@pytest.mark.parametrize("mechanism", ["discrete_gaussian", "skellam"])
@pytest.mark.parametrize(("count", "size"), [(2, 10), (10, 650), (100, 10**5), (1000, 2**20)])
@pytest.mark.parametrize("noise_multiplier", [0.3, 1.0, 4.0])
def test_it_costs_what_the_gaussian_costs(mechanism: Any, count: int, size: int, noise_multiplier: float) -> None:
    grid = Grid(1.0, size, noise_multiplier, count, mechanism)
    assert grid.variance >= 16**2
    assert math.sqrt(grid.max_square) <= grid.levels * 1.001, "rounding adds a thousandth at most"
    assert count * grid.variance >= noise_multiplier**2 * grid.max_square
    found, gaussian = Ledger(), Ledger()
    found.record(Gaussian(grid.effective_noise_multiplier, Distributed(mechanism)), 10)
    gaussian.record(
        Gaussian(noise_multiplier, Full() if mechanism == "discrete_gaussian" else Distributed("skellam")), 10
    )
    expected = gaussian.epsilon(1e-5, "rdp")
    assert abs(found.epsilon(1e-5) - expected) <= 1e-3 * max(1.0, expected / 10)
    assert found.epsilon(1e-5, "pld").method == "rdp"
    restored = Ledger()
    restored.load_state_dict(found.state_dict())
    assert restored == found


def test_integer_orders_cost_little_more_than_all() -> None:
    for noise_multiplier, most in ((1.0, 1.05), (4.0, 1.004), (10.0, 1.003)):
        ledgers = {noise: Ledger() for noise in ("discrete_gaussian", "skellam")}
        for noise, ledger in ledgers.items():
            ledger.record(Gaussian(noise_multiplier, Distributed(noise)), 10)
        epsilons = {noise: ledger.epsilon(1e-5) for noise, ledger in ledgers.items()}
        assert 1.0 <= epsilons["skellam"] / epsilons["discrete_gaussian"] <= most


def renyi(p: np.ndarray, q: np.ndarray, order: int) -> float:
    return float(np.log((p**order * q ** (1.0 - order)).sum()) / (order - 1))


def pmf_of_the_sum(mechanism: str, variance: int, count: int, reach: int) -> np.ndarray:
    values = np.arange(-reach, reach + 1).astype(float)
    if mechanism == "skellam":
        return np.asarray(skellam.pmf(values, count * variance / 2, count * variance / 2))
    one = np.exp(-(values**2) / (2 * variance))
    one /= one.sum()
    total = one
    for _ in range(count - 1):
        total = np.convolve(total, one, mode="same")
    return total


@pytest.mark.parametrize("mechanism", ["discrete_gaussian", "skellam"])
@pytest.mark.parametrize(("variance", "count"), [(1, 2), (1, 5), (2, 3), (9, 4)])
def test_the_bound_is_above_the_exact_divergence(mechanism: Any, variance: int, count: int) -> None:
    deviation = (variance * count) ** 0.5
    pmf = pmf_of_the_sum(mechanism, variance, count, int(60 * deviation))
    for shift in (1, 2, 3):
        bound = gaussian_bound(mechanism, shift**2, 1, variance, count)
        for order in (2, 3, 5, 8):
            near = slice(int(60 * deviation) - int(8 * deviation) - 9, int(60 * deviation) + int(8 * deviation) + 10)
            exact = renyi(np.roll(pmf, shift)[near], pmf[near], order)
            assert exact <= order / (2 * bound**2) * (1 + 1e-9)
            if shift == 1 and variance > 1:  # the control: with more noise than that a Gaussian would claim too much
                assert exact > order / (2 * (2 * bound) ** 2)


def hockey_stick(p: np.ndarray, q: np.ndarray, epsilon: float) -> float:
    return float(np.maximum(p - math.exp(epsilon) * q, 0.0).sum())


@pytest.mark.parametrize(("variance", "count"), [(1, 7), (2, 3), (3, 2), (9, 4), (16, 3), (40, 1)])
@pytest.mark.parametrize("shift", [(3,), (12,), (3, 4), (1, 1), (0, 5)])
def test_exact_deltas_are_below_those_of_the_gaussian(variance: int, count: int, shift: tuple[int, ...]) -> None:
    """Sums of discrete Gaussians in one and two dimensions, shifted by integers."""
    norm, reach = sum(step**2 for step in shift), int(14 * (variance * count) ** 0.5) + 24
    one = pmf_of_the_sum("discrete_gaussian", variance, count, reach)
    pmf, moved = np.ones(()), np.ones(())
    for step in shift:
        pmf, moved = np.multiply.outer(pmf, one), np.multiply.outer(moved, np.roll(one, step))
    slack = gaussian_slack("discrete_gaussian", len(shift), variance, count)
    assert slack is not None
    z = math.sqrt((count * variance - ROUNDING_VARIANCE) / norm)
    for epsilon in (0.0, 0.1, 0.5, 1.0, 2.0, 4.0):
        inner = epsilon - 2 * slack
        most = math.exp(slack) * (ndtr(0.5 / z - inner * z) - math.exp(inner) * ndtr(-0.5 / z - inner * z))
        assert hockey_stick(moved, pmf, epsilon) <= most * (1 + 1e-9) + 1e-12
        # The control: a Gaussian with twice the noise would claim too much.
        if epsilon <= 0.1:
            claimed = ndtr(0.25 / z - epsilon * 2 * z) - math.exp(epsilon) * ndtr(-0.25 / z - epsilon * 2 * z)
            assert hockey_stick(moved, pmf, epsilon) > claimed or z < 0.2


@pytest.mark.parametrize(("count", "size"), [(2, 10), (100, 10**5), (1000, 2**20)])
@pytest.mark.parametrize("noise_multiplier", [0.3, 1.0, 4.0])
def test_it_costs_what_the_gaussian_costs_exactly(count: int, size: int, noise_multiplier: float) -> None:
    grid = Grid(1.0, size, noise_multiplier, count, "discrete_gaussian")
    assert grid.slack is not None
    assert grid.slack < 1e-20
    found, gaussian, by_renyi = Ledger(), Ledger(), Ledger()
    found.record(Gaussian(grid.effective_noise_multiplier, Distributed("discrete_gaussian", grid.slack)), 10)
    gaussian.record(Gaussian(noise_multiplier), 10)
    by_renyi.record(Gaussian(grid.effective_noise_multiplier, Distributed("discrete_gaussian")), 10)
    for group in (1, 2):
        expected = gaussian.epsilon(1e-5, group=group)
        assert found.epsilon(1e-5, group=group) == pytest.approx(expected, rel=1e-3)
        assert expected * 1.02 < by_renyi.epsilon(1e-5, group=group)
    assert (found.epsilon(1e-5).method, by_renyi.epsilon(1e-5).method) == ("pld", "rdp")
    restored = Ledger()
    restored.load_state_dict(found.state_dict())
    assert restored == found


def test_a_large_slack_is_counted_or_not_used() -> None:
    def epsilon(slack: float | None, count: int = 10) -> Any:
        ledger = Ledger()
        ledger.record(Gaussian(4.0, Distributed("discrete_gaussian", slack)), count)
        ledger.record(Gaussian(8.0))
        return ledger.epsilon(1e-5)

    assert epsilon(0.0).method == "pld"
    assert 2e-4 <= epsilon(1e-5) - epsilon(0.0) < 3e-4
    assert epsilon(1e-3) == epsilon(None)
    assert epsilon(1e-3).method == "rdp"
    assert gaussian_slack("skellam", 3, 100, 4) is None
    assert gaussian_slack("discrete_gaussian", 3, 0, 4) is None


def test_without_noise_there_is_no_guarantee() -> None:
    grid = replace(GRID, noise_multiplier=0.0)
    assert (grid.variance, grid.effective_noise_multiplier) == (0, 0.0)


def test_sums_that_would_wrap_are_refused() -> None:
    grid = Grid(1.0, 10**6, 1.0, 10, "discrete_gaussian")
    grid.check_modulus(10, 32)
    with pytest.raises(ValueError, match="modulus_bits=64"):
        grid.check_modulus(10**5, 32)
    grid.check_modulus(10**5, 64)


def test_noise_of_a_broken_source_stops_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(IntegerNoise, "sample", lambda self, mechanism, size, variance: torch.zeros(size).long())
    with pytest.raises(PrivacyError, match="standard deviation"):
        GRID.encode(Update({"a": torch.zeros(40)}), IntegerNoise())
