"""An engineer, two hospitals and a researcher, with the wheel in an empty directory."""

from __future__ import annotations

import os
import re
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import CompletedProcess

import pytest
import torch

from tests.helpers.distributed import run_script
from tests.helpers.wheel import run

pytestmark = pytest.mark.slow
DISAGREE = "do not train the same thing"


def test_an_engineer(site: Path) -> None:
    assert run(site, "--version").stdout.startswith("lightning-fl ")
    run(site, "init", "first")
    first = Path("first").resolve()
    assert "label skew" in run(site, "partition", "--config", "config.yaml", cwd=first).stdout
    fit = run(site, "fit", "--config", "config.yaml", "--trainer.max_epochs", "3", cwd=first).stdout
    printed = re.search(r"lightning-fl (report \S+)", fit)
    assert printed is not None
    run(site, *printed[1].split(), cwd=first)  # the command that was printed works
    assert len(list(first.glob("logs/**/report.html"))) == 1
    again = ("--trainer.max_epochs", "4", "--ckpt_path", "last")
    assert "Resuming with round 4" in "".join(
        (done := run(site, "fit", "--config", "config.yaml", *again, cwd=first)).stdout + done.stderr
    )
    wrong = run(site, "fit", "--config", "config.yaml", "--trainer.max_epoch_s", "3", cwd=first, check=False)
    assert wrong.returncode == 2
    assert "Did you mean 'trainer.max_epochs'?" in wrong.stderr


def launch(site: Path, folders: list[Path], *own: tuple[str, ...]) -> list[CompletedProcess[str]]:
    """A launch of each hospital on a machine of its own, as far as folders and processes go."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    where = ["--nnodes", str(len(folders)), "--nproc_per_node", "1", "--master_addr", "127.0.0.1"]
    rest = ["-m", "lightning_fl", "fit", "--config", "silos.yaml", "--data.sites", "[north,east]"]

    def one(rank: int) -> CompletedProcess[str]:
        words = [sys.executable, "-m", "torch.distributed.run", *where, "--master_port", port, "--node_rank", str(rank)]
        env = {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1", "LIGHTNING_FL_SILO_NAME": folders[rank].name}
        more = own[rank] if own else ()
        options = [*rest, "--trainer.max_epochs", "2", *more]
        return run_script([*words, *options], cwd=folders[rank], check=False, env=env, num_processes=2)

    with ThreadPoolExecutor() as pool:
        return list(pool.map(one, range(len(folders))))


def test_two_hospitals(site: Path) -> None:
    folders = [Path(name).resolve() for name in ("north", "east")]
    for folder in folders:
        run(site, "init", str(folder))
    for refused in launch(site, folders, (), ("--model.lr", "0.5")):
        assert refused.returncode != 0
    assert f"Silo east and silo north {DISAGREE}" in refused.stderr
    assert "lr" in refused.stderr.partition(DISAGREE)[2].partition("\n")[0]
    for trained in launch(site, folders):
        assert trained.returncode == 0, trained.stderr
    north, east = folders
    assert list(north.glob("logs/silos/*/rounds.jsonl"))
    model = torch.load(east / "silos" / "east" / "model.ckpt", weights_only=True)
    (saved,) = north.rglob("*.ckpt")
    expected = torch.load(saved, weights_only=True)["state_dict"]
    assert all(torch.equal(value, expected[name]) for name, value in model["state_dict"].items())
    run(site, "report", "silos/east", cwd=east)
    assert "north, east" in (east / "silos" / "east" / "report.html").read_text(encoding="utf-8")


ALGORITHM = """
from dataclasses import dataclass

from lightning_fl.algorithms import FedAvg


@dataclass(frozen=True)
class Damped(FedAvg):
    server_lr: float = 0.5
"""
OWN = """
trainer:
  strategy:
    class_path: lightning_fl.FederatedStrategy
    init_args:
      algorithm:
        class_path: own.Damped
"""


def test_a_researcher(site: Path) -> None:
    assert "digits_fedavg" in run(site, "recipes").stdout
    run(site, "recipes", "copy", "digits_fedavg")
    Path("own.py").write_text(ALGORITHM, encoding="utf-8")
    Path("own.yaml").write_text(OWN, encoding="utf-8")
    for seed in ("0", "1"):
        for name, strategy in {"fedavg": ["--trainer.strategy", "fedavg"], "damped": ["--config", "own.yaml"]}.items():
            logger = ["--trainer.logger.init_args.name", f"{name}_{seed}"]
            words = ["--config", "digits_fedavg.yaml", *strategy, *logger, "--seed_everything", seed]
            run(site, "fit", *words, "--trainer.max_epochs", "2", PYTHONPATH=f"{site}{os.pathsep}.")
    folders = [str(path.parent) for path in sorted(Path().rglob("run.json"))]
    assert len(folders) == 4
    table = run(site, "compare", *folders, "--group-by", "algorithm", "--format", "csv").stdout
    assert re.search(r"Damped\(server_lr=0\.5\),Damped,2,2,", table)
    run(site, "report", str(Path(folders[0]).parent.parent))
