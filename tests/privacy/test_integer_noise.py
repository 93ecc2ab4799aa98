"""Integer noise: its distribution against the probabilities, and exact decisions where floats can't tell."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chi2, skellam

from lightning_fl.privacy import integer_noise
from lightning_fl.privacy.integer_noise import IntegerNoise

NUM_SAMPLES = 400_000
MECHANISMS = ("discrete_gaussian", "skellam")


def probabilities(mechanism: str, variance: int) -> tuple[np.ndarray, np.ndarray]:
    """Values within four deviations, and their probabilities."""
    reach = int(4 * variance**0.5) + 1
    values = np.arange(-reach, reach + 1)
    if mechanism == "skellam":
        return values, skellam.pmf(values, variance / 2, variance / 2)
    everything = np.arange(-40 * reach, 40 * reach + 1)
    return values, np.exp(-(values**2) / (2 * variance)) / np.exp(-(everything**2) / (2 * variance)).sum()


def p_value(samples: Any, mechanism: str, variance: int) -> float:
    values, expected = probabilities(mechanism, variance)
    found = np.array([(samples == value).sum() for value in values])
    expected = np.append(expected, 1 - expected.sum()) * len(samples)
    found = np.append(found, len(samples) - found.sum())
    return float(chi2.sf(((found - expected) ** 2 / expected).sum(), len(values)))


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("variance", [1, 2, 19, 21, 300])
@pytest.mark.spread(3)
def test_the_distribution_is_that_of_the_mechanism(mechanism: Any, variance: int) -> None:
    samples = IntegerNoise(variance, "distribution").sample(mechanism, NUM_SAMPLES, variance).numpy()
    assert p_value(samples, mechanism, variance) > 1e-4
    # The control: twice the noise, or a mean of one half, would be noticed.
    assert p_value(samples * 2, mechanism, variance) < 1e-12
    assert p_value(samples + (np.arange(NUM_SAMPLES) % 2), mechanism, variance) < 1e-12


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("variance", [1 << 16, (1 << 31) + 7, 1 << 45])
def test_large_variances(mechanism: Any, variance: int) -> None:
    scaled = IntegerNoise().sample(mechanism, NUM_SAMPLES, variance).double() / variance**0.5
    for power, moment, spread in ((1, 0.0, 1.0), (2, 1.0, 2.0), (3, 0.0, 15.0), (4, 3.0, 96.0)):
        assert abs(float((scaled**power).mean()) - moment) < 5 * (spread / NUM_SAMPLES) ** 0.5


@pytest.mark.parametrize("variance", [1, 50, 10_007])
def test_exact_decisions_are_those_of_floats_where_these_can_tell(
    monkeypatch: pytest.MonkeyPatch, variance: int
) -> None:
    usual = IntegerNoise(7).sample("discrete_gaussian", 300, variance)
    monkeypatch.setattr(integer_noise, "DOUBT", 2.0)  # every decision is made in exact arithmetic
    assert torch.equal(IntegerNoise(7).sample("discrete_gaussian", 300, variance), usual)


def test_a_tie_of_64_bits_is_decided_by_more() -> None:
    """The probability exp(-1) begins with these 64 bits; what follows them decides."""
    from decimal import Decimal, localcontext
    from fractions import Fraction

    with localcontext() as context:
        context.prec = 200
        bits = int(Decimal(-1).exp() * (1 << 128))
    word, rest = divmod(bits, 1 << 64)
    for following, expected in ((rest - 1, True), (rest + 1, False)):
        noise = IntegerNoise()
        noise._source.words = lambda size, following=following: np.array([following], dtype=np.uint64)  # type: ignore[method-assign, misc]
        assert noise._is_below_exp(word, Fraction(1)) is expected


def test_streams_differ_and_test_seeds_repeat() -> None:
    for mechanism in MECHANISMS:
        drawn = [IntegerNoise(*purpose).sample(mechanism, 100, 900) for purpose in ((), (), (1, 2), (1, 2), (1, 3))]
        assert torch.equal(drawn[2], drawn[3])
        assert len({tuple(own.tolist()) for own in drawn}) == 4


@pytest.mark.parametrize("variance", [0, -1, (1 << 52) + 1])
def test_variances_out_of_range_are_refused(variance: int) -> None:
    with pytest.raises(ValueError, match="between 1 and 2"):
        IntegerNoise().sample("discrete_gaussian", 1, variance)
    assert len(IntegerNoise().sample("discrete_gaussian", 0, 1)) == 0
