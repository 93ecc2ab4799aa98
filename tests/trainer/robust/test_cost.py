"""What robust rules cost on each of two ranks: memory, and bytes at the collectives."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_fl.aggregation.robust import rows
from lightning_fl.types import Update
from tests.helpers.distributed import REPOSITORY
from tests.helpers.federation import join_ranks

NUM_CLIENTS, SIZE, RANKS = 32, 1 << 16, 2
MODEL = 4 * SIZE
ROWS = NUM_CLIENTS * MODEL
WINDOW = 1 << 15
BYTES_OF_WINDOW = 32 * WINDOW  # what rows.py promises


class Alive(TorchDispatchMode):
    """Adds up the bytes of the tensors that come into being inside, as long as anything holds them."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        self.storages = {key: own for key, own in self.storages.items() if not own[0].expired()}
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and (storage := leaf.untyped_storage())._cdata not in given:
                self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(num_bytes for _, num_bytes in self.storages.values()))
        return result


def measured(names: Sequence[str], silos: bool = False) -> dict[str, tuple[int, int]]:
    """For each rule of the benchmark the most bytes of tensors on this rank, and those that it has sent."""
    sys.path.insert(0, str(REPOSITORY / "benchmarks"))
    robust: Any = importlib.import_module("robust")
    group, found, before = join_ranks(), {}, rows.WINDOW
    generator = torch.Generator().manual_seed(group.rank)
    updates = [Update({"w": torch.randn(SIZE, generator=generator)}) for _ in range(NUM_CLIENTS // RANKS)]
    clients = range(group.rank, NUM_CLIENTS, RANKS)
    rows.WINDOW = WINDOW
    try:
        for name in names:
            with Alive() as alive:
                cost = robust.measure(robust.RULES[name], group, updates, clients, NUM_CLIENTS, silos)
            found[name] = alive.peak, cost.sent
    finally:
        rows.WINDOW = before
    return found


BRIEF = ("Median", "Krum", "NNM + TrimmedMean")
OTHERS = ("TrimmedMean", "MeanAroundMedian", "MultiKrum", "Bulyan", "GeometricMedian", "RFA", "CenteredClipping")
OTHERS += ("NormBound", "FLTrust", "DnC", "FLAME", "Screened", "FoolsGold, one round")
MOST = ROWS // RANKS + BYTES_OF_WINDOW + 3 * MODEL
"""The rows of this rank's clients, a window, and vectors as long as the model: the result, its sum, its mean."""


def assert_cheap(found: dict[str, tuple[int, int]]) -> None:
    for name, (peak, sent) in found.items():
        assert peak <= MOST, name
        # Of its rows a rank sends to the other what that works on: once, and twice where coordinates follow a Gram.
        assert sent <= 2 * ROWS // RANKS**2 + 2 * MODEL, name


@pytest.mark.parametrize("names", [BRIEF, pytest.param(OTHERS, marks=pytest.mark.slow)], ids=["brief", "others"])
def test_a_rank_holds_its_share_of_the_rows_and_a_window(run_ranks: Callable[..., Any], names: Sequence[str]) -> None:
    for found in run_ranks(RANKS, measured, names):
        assert_cheap(found)


def test_silos_hold_all_rows(run_ranks: Callable[..., Any]) -> None:
    """Which the bound of a simulation finds."""
    for found in run_ranks(RANKS, measured, ["Krum"], silos=True):
        assert ROWS < found["Krum"][0] <= ROWS + MOST
        with pytest.raises(AssertionError, match="Krum"):
            assert_cheap(found)
