"""SLURM ends a job and queues it again: the federation goes on from the round in which the signal came."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers.distributed import PATIENCE, REPOSITORY, launches
from tests.trainer.resume.requeued import train

SCRIPT = Path(__file__).with_name("requeued.py")


def job(folder: Path, at: int, engine: str) -> int:
    """Runs the job as SLURM would; returns its exit code."""
    tools = folder / "tools"
    tools.mkdir(exist_ok=True)
    (tools / "scontrol").write_text(f"#!/bin/sh\necho $* >> {folder}/calls\n")
    (tools / "scontrol").chmod(0o755)
    slurm = {"JOB_ID": "11", "JOB_NAME": "train", "NTASKS": "1", "NTASKS_PER_NODE": "1", "NNODES": "1"}
    slurm |= {"PROCID": "0", "LOCALID": "0", "NODEID": "0", "NODELIST": "localhost"}
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "PYTEST", "PL_"))},
        **{f"SLURM_{name}": value for name, value in slurm.items()},
        "PATH": f"{tools}:{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": "1",
    }
    launches.append("a SLURM job")
    command = [sys.executable, "-W", "ignore", str(SCRIPT), str(folder), str(at), engine]
    return subprocess.run(command, env=environment, timeout=PATIENCE, check=False).returncode


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "at"), [("auto", 8), ("kept", 13)])
def test_a_requeued_job_goes_on_from_the_start_of_its_round(tmp_path: Path, engine: str, at: int) -> None:
    assert job(tmp_path, at, engine) == 7
    assert (tmp_path / "calls").read_text() == "requeue 11\n"
    checkpoint = torch.load(tmp_path / "hpc_ckpt_1.ckpt", weights_only=True)
    done = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["completed"]
    assert job(tmp_path, 10**6, engine) == 0
    found, rounds = torch.load(tmp_path / "result.pt")
    assert 0 < done < rounds
    (tmp_path / "whole").mkdir()
    expected, _ = train(str(tmp_path / "whole"), 10**6, engine)
    assert torch.equal(found, expected)
