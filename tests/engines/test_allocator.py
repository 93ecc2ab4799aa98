"""Memory that is freed and fetched again, step after step."""

from __future__ import annotations

import resource
from collections.abc import Iterator

import pytest
import torch

import lightning_fl as fl
from lightning_fl.engines.allocator import keep_freed_memory


@pytest.fixture(autouse=True)
def as_after_a_fit() -> Iterator[None]:
    """Other tests go on with what a fit of many clients leaves."""
    yield
    keep_freed_memory(fl.engines.Vectorized().kept_bytes)


def page_faults() -> int:
    """Pages that the operating system hands over while 40 tensors of 8 MB are made one after the other."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(40):
        torch.zeros(2_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_freed_memory_is_used_again_without_the_operating_system() -> None:
    assert keep_freed_memory(64 * 2**20)
    page_faults()
    kept = page_faults()
    assert keep_freed_memory(0)
    given_back = page_faults()
    assert kept < 4_000 < 40_000 < given_back


@pytest.mark.parametrize(
    ("name", "value"), [("MALLOC_TRIM_THRESHOLD_", "1000000"), ("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=1")]
)
def test_the_users_own_rule_goes_first(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    assert not keep_freed_memory(64 * 2**20)


def test_a_negative_number_is_refused() -> None:
    with pytest.raises(ValueError, match="kept_bytes=-1; expected at least 0"):
        fl.engines.Vectorized(kept_bytes=-1)
