"""What attacks and compression do to training on the digits: who holds and who falls."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from tests.helpers.distributed import REPOSITORY

pytestmark = pytest.mark.slow


@pytest.fixture
def robust(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The benchmark, whose table these are entries of."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    return importlib.import_module("robust")


@pytest.mark.parametrize(
    ("rule", "attack", "least", "most"),
    [
        ("mean", "none", 0.92, 1.0),
        ("mean", "sign x 5", 0.0, 0.15),
        ("mean", "IPM 10", 0.0, 0.15),
        ("Krum", "lazy", 0.0, 0.2),
        ("Median", "IPM 10", 0.0, 0.85),
        ("FoolsGold", "sign x 5", 0.0, 0.2),
        ("MultiKrum", "sign x 5", 0.88, 1.0),
        ("NNM + TrimmedMean", "ALIE", 0.88, 1.0),
        ("FLAME", "IPM 10", 0.88, 1.0),
    ],
)
def test_rules_hold_or_fall(robust: Any, rule: str, attack: str, least: float, most: float) -> None:
    found = robust.accuracy(robust.RULES[rule], robust.ATTACKS[attack], seed=0, rounds=60)
    assert least <= found <= most
