"""Ray Train starts silos: they train what one process trains."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

import lightning_fl as fl
from tests.helpers.distributed import PATIENCE, run_script
from tests.helpers.training import Plain, trainer
from tests.trainer.ranks.ray_silos import NUM_SILOS, loader_of

RAY = "ray==2.60.0"


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """An interpreter that has Ray besides what this one has."""
    own = tmp_path / "ray"
    subprocess.run([sys.executable, "-m", "venv", own], check=True, timeout=PATIENCE)
    (packages,) = own.glob("lib/*/site-packages")
    (packages / "others.pth").write_text(sysconfig.get_path("purelib"))
    subprocess.run([own / "bin" / "python", "-m", "pip", "install", "-q", RAY], check=True, timeout=2 * PATIENCE)
    return own / "bin" / "python"


@pytest.mark.slow
@pytest.mark.timeout(4 * PATIENCE)
def test_each_worker_of_ray_train_is_a_silo(tmp_path: Path, python: Path) -> None:
    script = str(Path(__file__).with_name("ray_silos.py"))
    run_script([str(python), script, str(tmp_path)], num_processes=1 + NUM_SILOS, timeout=2 * PATIENCE)
    module = Plain(torch.float64)
    clients = fl.datamodules.ClientLoaders({rank: loader_of(rank) for rank in range(NUM_SILOS)})
    trainer(fl.FederatedStrategy("fedavg", engine="sequential"), max_epochs=3).fit(module, clients)
    for rank in range(NUM_SILOS):
        model, num_clients = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(model, dict(module.state_dict()), rtol=1e-9, atol=1e-9)
        assert num_clients == [NUM_SILOS] * 3
