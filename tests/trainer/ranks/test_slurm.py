"""A job of three nodes on a real Slurm, which is requeued in the middle, trains what torchrun trains."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch

from tests.helpers.distributed import REPOSITORY, run_script
from tests.helpers.network import wait_until
from tests.helpers.slurm import HAS_SLURM, Slurm

FIT = ["--config", "silos.yaml", "--trainer.max_epochs", "30", "--trainer.enable_progress_bar", "false"]


def rounds_of(folder: Path) -> int:
    """How many rounds the newest run in a folder has logged."""
    files = sorted(folder.glob("logs/digits_silos/version_*/metrics.csv"))
    lines = files[-1].read_text().splitlines() if files else []
    return int(lines[-1].split(",")[0]) if len(lines) > 1 else -1


def model_of(folder: Path) -> dict[str, torch.Tensor]:
    (checkpoint,) = sorted(folder.glob("logs/digits_silos/version_*/checkpoints/last.ckpt"))[-1:]
    found: dict[str, torch.Tensor] = torch.load(checkpoint, weights_only=True)["state_dict"]
    return found


@pytest.mark.slow
@pytest.mark.skipif(not HAS_SLURM, reason="needs root and slurmctld, slurmd, slurm-client and munge")
def test_a_job_that_is_requeued_goes_on_and_gives_what_torchrun_gives(tmp_path: Path) -> None:
    job, torchrun = tmp_path / "job", tmp_path / "torchrun"
    for folder in (job, torchrun):
        folder.mkdir()
        shutil.copy(REPOSITORY / "recipes" / "digits_silos.yaml", folder / "silos.yaml")
    words = ["-m", "lightning_fl", "launch", "slurm", "--silos", "3", "--time", "00:30:00", *FIT]
    (job / "job.sh").write_text(run_script(["python", *words], cwd=job).stdout)
    with Slurm(tmp_path / "slurm", 3) as slurm:
        number = slurm("sbatch", "--parsable", "job.sh", cwd=job)
        wait_until(lambda: rounds_of(job) >= 3, "the first rounds")
        slurm("scancel", "--signal=USR1", number)  # as before its time is over
        wait_until(lambda: slurm.state(number) == "PENDING", "the job in the queue again")
        assert (job / "hpc_ckpt_1.ckpt").exists()
        slurm("scontrol", "update", f"JobId={number}", "StartTime=now")  # it would wait for two minutes
        wait_until(lambda: not slurm.state(number), "the end of the job")
    (resumed,) = re.findall(r"Resuming with round (\d+) after", next(job.glob("*.out")).read_text())
    assert 3 <= int(resumed) < 29 == rounds_of(job)
    launch = ["python", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "3", "-m", "lightning_fl"]
    run_script([*launch, "fit", *FIT], cwd=torchrun, num_processes=4)
    torch.testing.assert_close(model_of(job), model_of(torchrun), rtol=0, atol=0)
