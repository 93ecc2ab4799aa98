"""Checkpoints that an earlier version has written still load, and go on to the same bits."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
import torch

from tests.fixtures.make_checkpoints import STRATEGIES, fit

ARCHIVE = Path(__file__).parents[2] / "fixtures" / "checkpoints_82306ea.tar.gz"

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:insecure_test_seed"),
    pytest.mark.filterwarnings("ignore:.*NOT PRIVATE"),
]


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_run_of_82306ea_goes_on_to_the_same_weights(name: str, tmp_path: Path) -> None:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    found = fit(name, tmp_path / name / "epoch=1.ckpt")
    for key, expected in torch.load(tmp_path / name / "weights.pt", weights_only=True).items():
        torch.testing.assert_close(found[key], expected, rtol=1e-10, atol=1e-12)
