from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_fl.privacy.secagg.masks import Keystream
from lightning_fl.privacy.secagg.quantize import DTYPES, MAX_SCALAR, NUM_LIMBS, Quantizer, from_limbs, to_limbs


def encode(quantizer: Quantizer, values: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
    vector = torch.zeros(len(values), dtype=DTYPES[quantizer.modulus_bits])
    quantizer.add(vector, values, factor, Keystream())
    return vector


@pytest.mark.parametrize(("num_clients", "bits"), [(1, 31), (3, 29), (10, 27), (100, 24), (1000, 21), (1 << 15, 16)])
def test_bits_of_32_bit_words(num_clients: int, bits: int) -> None:
    assert Quantizer(num_clients, 1.0).bits == bits
    assert num_clients * (2**bits - 1) < 2**31 <= num_clients * (2 ** (bits + 1) - 1)


@pytest.mark.parametrize("modulus_bits", [32, 64])
@pytest.mark.parametrize("num_clients", [1, 3, 7, 100])
def test_the_largest_sum_does_not_wrap(num_clients: int, modulus_bits: int) -> None:
    quantizer = Quantizer(num_clients, 2.0, modulus_bits)
    for sign in (-1.0, 1.0):
        vector = torch.zeros(4, dtype=DTYPES[modulus_bits])
        for _ in range(num_clients):
            quantizer.add(vector, torch.full((4,), sign * 1e30), 1.0, Keystream())
        assert quantizer.decode(vector).tolist() == pytest.approx([sign * 2.0 * num_clients] * 4, rel=1e-12)


def test_one_more_client_than_laid_out_for_may_wrap() -> None:
    quantizer = Quantizer(1, 2.0)
    vector = encode(quantizer, torch.full((4,), 2.0))
    quantizer.add(vector, torch.full((4,), 2.0), 1.0, Keystream())
    assert (vector < 0).all(), "which is why the number of clients is fixed before"


@pytest.mark.parametrize("setting", [(1 << 15) + 1, 0])
def test_too_many_clients_are_refused(setting: int) -> None:
    with pytest.raises(ValueError, match="modulus_bits=64, or fewer clients"):
        Quantizer(setting, 1.0)


@pytest.mark.parametrize("clip", [0.0, -1.0, math.inf, math.nan])
def test_wrong_clips_are_refused(clip: float) -> None:
    with pytest.raises(ValueError, match="clip"):
        Quantizer(3, clip)
    with pytest.raises(ValueError, match="modulus_bits=16"):
        Quantizer(3, 1.0, 16)


@given(st.lists(st.floats(-3, 3), min_size=1, max_size=20), st.sampled_from([32, 64]), st.floats(0, 1))
def test_an_error_is_below_one_step(values: list[float], modulus_bits: int, factor: float) -> None:
    quantizer = Quantizer(1000, 2.0, modulus_bits)
    given_values = torch.tensor(values, dtype=torch.float64)
    found = quantizer.decode(encode(quantizer, given_values, factor))
    assert ((found - given_values.clamp(-2, 2) * factor).abs() <= quantizer.step * (1 + 1e-6)).all()


def test_rounding_is_unbiased_and_stochastic() -> None:
    quantizer = Quantizer(1 << 15, 1.0)
    values = torch.full((400_000,), 0.3 * quantizer.step, dtype=torch.float64)
    vector = encode(quantizer, values)
    assert set(vector.unique().tolist()) == {0, 1}
    assert vector.double().mean().item() == pytest.approx(0.3, abs=5 * math.sqrt(0.21 / 400_000))


@pytest.mark.parametrize("value", [0.0, 1.0, -1.0])
def test_levels_are_met_exactly(value: float) -> None:
    quantizer = Quantizer(3, 1.0)
    found = quantizer.decode(encode(quantizer, torch.full((1000,), value)))
    assert (found - value).abs().max() < 1e-15


def test_rounding_ignores_seeds() -> None:
    quantizer = Quantizer(1 << 15, 1.0)
    drawn = []
    for _ in range(2):
        torch.manual_seed(0)
        drawn.append(encode(quantizer, torch.full((1000,), 0.5 * quantizer.step)))
    assert not torch.equal(*drawn)


def test_clipping_is_told() -> None:
    quantizer = Quantizer(3, 1.0)
    vector = torch.zeros(2, dtype=torch.int32)
    assert not quantizer.add(vector, torch.tensor([1.0, -1.0]), 1.0, Keystream())
    assert quantizer.add(vector, torch.tensor([0.0, -1.1]), 1.0, Keystream())


@given(st.lists(st.lists(st.floats(-1e12, 1e12), min_size=3, max_size=3), min_size=1, max_size=8))
def test_sums_of_figures_are_exact(rows: list[list[float]]) -> None:
    vector = sum((to_limbs(torch.tensor(row, dtype=torch.float64), torch.int32) for row in rows), torch.tensor(0))
    sums = [math.fsum(column) for column in zip(*rows, strict=True)]
    assert from_limbs(vector.int()).tolist() == pytest.approx(sums, rel=1e-15, abs=len(rows) * 2.0**-45)


def test_many_of_the_largest_figures_do_not_wrap() -> None:
    largest = math.nextafter(MAX_SCALAR, 0)
    for scalar in (largest, -largest, -(2.0**-45)):
        vector = to_limbs(torch.tensor([scalar], dtype=torch.float64), torch.int32)
        assert len(vector) == NUM_LIMBS
        assert vector.long().abs().max() * (1 << 15) < 2**31
        assert from_limbs(vector * (1 << 15)).item() == pytest.approx(scalar * (1 << 15), rel=1e-12)


@pytest.mark.parametrize("scalar", [MAX_SCALAR, -1e20, math.inf, math.nan])
def test_figures_out_of_range_are_refused(scalar: float) -> None:
    with pytest.raises(ValueError, match="the largest in a secure sum"):
        to_limbs(torch.tensor([1.0, scalar], dtype=torch.float64), torch.int32)
