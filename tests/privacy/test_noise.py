"""The noise is normal, unpredictable, and checked as it is added."""

from __future__ import annotations

import sys

import lightning as L
import pytest
import torch
from scipy import stats

from lightning_fl.privacy import InsecureNoiseWarning, PrivacyError, SecureNoise
from lightning_fl.privacy import noise as module
from lightning_fl.privacy.noise import add_noise, check_added, check_deviation, check_source, warn_of_test_seed

SIZE = 200_000


@pytest.mark.parametrize("std", [1.0, 0.01])
def test_samples_are_normal(std: float) -> None:
    samples = SecureNoise().normal(SIZE, std) / std
    assert abs(float(samples.std()) - 1) < 5 / (2 * SIZE) ** 0.5
    assert abs(float(samples.mean())) < 5 / SIZE**0.5
    assert stats.kstest(samples.numpy(), "norm").pvalue > 1e-5
    assert abs(float((samples**4).mean()) - 3) < 5 * (96 / SIZE) ** 0.5
    assert samples.dtype == torch.float64


def test_the_check_of_normality_finds_what_is_not() -> None:
    uniform = (torch.rand(SIZE, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 0.5) * 12**0.5
    assert stats.kstest(uniform.numpy(), "norm").pvalue < 1e-5


def test_samples_do_not_depend_on_each_other() -> None:
    first, second = SecureNoise(), SecureNoise()
    a, b, c = first.normal(SIZE), first.normal(SIZE), second.normal(SIZE)
    for left, right in ((a, b), (a, c), (a[:-1], a[1:]), (a[::2], a[1::2]), (a, b**2 - 1)):
        assert abs(float((left * right).mean())) < 6 * 2**0.5 / len(left) ** 0.5
    step = module.CHUNK
    assert abs(float((a[:step] * a[step : 2 * step]).mean())) < 6 / step**0.5


def test_seeds_do_not_reach_it() -> None:
    drawn = []
    for _ in range(2):
        L.seed_everything(0, workers=True, verbose=False)
        drawn.append((SecureNoise().normal(100), torch.randn(100)))
    assert torch.equal(drawn[0][1], drawn[1][1])
    assert not (drawn[0][0] == drawn[1][0]).any()


def test_it_leaves_the_users_generators_alone() -> None:
    before = torch.get_rng_state()
    SecureNoise().normal(1000)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_test_seed_repeats_and_says_so() -> None:
    assert torch.equal(SecureNoise(7, 3).normal(10), SecureNoise(7, 3).normal(10))
    assert not (SecureNoise(7, 3).normal(10) == SecureNoise(7, 4).normal(10)).any()
    with pytest.warns(InsecureNoiseWarning, match="NOT PRIVATE"):
        warn_of_test_seed()


def test_known_answer() -> None:
    """Box and Muller over the key stream of AES-256 in counter mode, written out."""
    import hashlib
    import math

    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    key = hashlib.sha256(b"(1,)").digest()
    stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor().update(bytes(8 * 12))
    u = [(int.from_bytes(stream[8 * i : 8 * i + 8], "little") >> 11) / 2**53 for i in range(12)]
    expected = [
        sum(math.sqrt(-2 * math.log(1 - u[3 * j + i])) * math.cos(2 * math.pi * u[6 + 3 * j + i]) for j in (0, 1))
        / 2**0.5
        for i in range(3)
    ]
    assert SecureNoise(1).normal(3).tolist() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("size", [1, 2, 10, 1000, 100_000])
def test_good_noise_passes_its_check(size: int) -> None:
    for _ in range(20):
        check_deviation(SecureNoise().normal(size, 3.0), 3.0)
    check_deviation(torch.zeros(0), 3.0)


@pytest.mark.parametrize(
    ("noise", "size"),
    [
        (lambda n: torch.zeros(n), 1),
        (lambda n: torch.zeros(n), 1000),
        (lambda n: 0.5 * SecureNoise().normal(n), 200),
        (lambda n: 2 * SecureNoise().normal(n), 200),
        (lambda n: torch.full((n,), float("nan")), 3),
        (lambda n: SecureNoise().normal(n) * (torch.arange(n) % 2), 2000),
    ],
)
def test_noise_of_another_deviation_stops_the_run(noise, size: int) -> None:
    with pytest.raises(PrivacyError, match="standard deviation"):
        check_deviation(noise(size), 1.0)


def test_noise_that_the_values_swallow_stops_the_run() -> None:
    values = {torch.float32: torch.full((1000,), 1e9)}
    with pytest.raises(PrivacyError, match="rounding removes it"):
        check_added(values, add_noise(values, 1.0, SecureNoise()), 1.0)
    exact = {torch.float64: values[torch.float32].double()}
    check_added(exact, add_noise(exact, 1.0, SecureNoise()), 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
def test_noise_is_added_to_every_number(dtype: torch.dtype) -> None:
    values = {dtype: torch.zeros(5000, dtype=dtype)}
    result = add_noise(values, 2.0, SecureNoise())[dtype]
    real = torch.view_as_real(result) if dtype.is_complex else result
    assert result.dtype == dtype
    assert not (real == 0).any()
    assert float(real.std()) == pytest.approx(2.0, rel=0.1)
    assert not values[dtype].any()


def test_a_stuck_source_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    check_source()
    monkeypatch.setattr(module.os, "urandom", lambda size: bytes(size))
    with pytest.raises(PrivacyError, match="repeats"):
        check_source()


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.ciphers", None)
    with pytest.raises(ImportError, match=r"pip install 'lightning-fl\[privacy\]'"):
        SecureNoise()
