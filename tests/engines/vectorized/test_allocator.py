"""Memory that is freed and fetched again, step after step."""

from __future__ import annotations

import subprocess
import sys

import pytest

import lightning_fl as fl
from lightning_fl.engines.vectorized import allocator
from lightning_fl.engines.vectorized.allocator import keep_freed_memory

SCRIPT = """
import ctypes, resource, runpy, sys

kept_bytes = int(sys.argv[2])
assert not kept_bytes or runpy.run_path(sys.argv[1])["keep_freed_memory"](kept_bytes)
library = ctypes.CDLL(None)
library.malloc.restype = ctypes.c_void_p

def step():
    tensors = [ctypes.c_void_p(library.malloc(2_000_000)) for _ in range(12)]
    for tensor in tensors:
        library.memset(tensor, 1, 2_000_000)
    for tensor in tensors:
        library.free(tensor)

step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(kept_bytes: int) -> int:
    """Pages that the operating system hands to a fresh process whose steps allocate and free 24 MB each."""
    words = [sys.executable, "-c", SCRIPT, allocator.__file__, str(kept_bytes)]
    return int(subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout)


def test_freed_memory_is_used_again_without_the_operating_system() -> None:
    assert page_faults(kept_bytes=64 * 2**20) < 1_000 < 20_000 < page_faults(kept_bytes=0)


@pytest.mark.parametrize(
    ("name", "value"), [("MALLOC_TRIM_THRESHOLD_", "1000000"), ("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=1")]
)
def test_the_users_own_rule_goes_first(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    assert not keep_freed_memory(64 * 2**20)


def test_a_negative_number_is_refused() -> None:
    with pytest.raises(ValueError, match="kept_bytes=-1; expected at least 0"):
        fl.engines.Vectorized(kept_bytes=-1)
