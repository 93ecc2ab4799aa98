"""Job files: what they start, that a shell and the clusters' own rules take them, and what is refused."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_fl.cli import main

FIT = ["--config", "my silos.yaml", "--trainer.max_epochs", "5"]
STARTED = ["fit", *FIT, "--trainer.num_nodes", "3", "--trainer.devices", "2"]


def launch(capsys: pytest.CaptureFixture[str], cluster: str, *words: str) -> str:
    main(["launch", cluster, "--silos", "3", "--nproc", "2", *words, *FIT])
    return capsys.readouterr().out


def in_a_shell(script: str, **environment: str) -> list[str]:
    """The words with which a script calls ``srun`` or ``torchrun``, as bash splits them."""
    fake = 'srun() { printf "%s\\n" "$@"; }; torchrun() { srun "$@"; }; '
    run = subprocess.run(["bash", "-c", fake + script], capture_output=True, text=True, check=True, env=environment)
    return run.stdout.splitlines()


def test_a_batch_script_starts_one_task_a_silo(capsys: pytest.CaptureFixture[str]) -> None:
    script = launch(capsys, "slurm", "--cpus", "4", "--gpus", "2", "--time", "12:00:00", "--partition", "long")
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=(.*)$", script, re.MULTILINE))
    expected = {"nodes": "3", "ntasks-per-node": "2", "cpus-per-task": "4", "gpus-per-node": "2", "time": "12:00:00"}
    assert options.items() >= expected.items()
    assert options["signal"] == "SIGUSR1@90"  # for which Lightning saves and requeues
    assert script.startswith("#!/bin/bash\n#SBATCH")  # Slurm reads no options after the first command
    assert not re.search(r"^#SBATCH", script[script.index("set -e") :], re.MULTILINE)
    assert in_a_shell(script, PATH="/usr/bin:/bin") == ["--kill-on-bad-exit=1", "lightning-fl", *STARTED]


def test_a_train_job_is_what_kubeflow_expects(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--image", "example.org/fl:1", "--cpus", "4", "--gpus", "1", "--out", "job.yaml"]
    assert launch(capsys, "kubernetes", *words) == "job file: job.yaml\n"
    job = yaml.safe_load(Path("job.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    assert job["spec"]["runtimeRef"] == {"name": "torch-distributed"}
    needed = {"cpu": "8", "nvidia.com/gpu": "1"}
    assert job["spec"]["trainer"] == {
        "image": "example.org/fl:1",
        "numNodes": 3,
        "numProcPerNode": 2,
        "command": ["torchrun", "-m", "lightning_fl", *STARTED],
        "resourcesPerNode": {"requests": needed, "limits": needed},
    }


def test_a_sky_task_starts_torchrun_on_every_machine(capsys: pytest.CaptureFixture[str]) -> None:
    task: dict[str, Any] = yaml.safe_load(launch(capsys, "skypilot", "--gpus", "A100", "--cpus", "4"))
    assert task["num_nodes"] == 3
    assert task["resources"] == {"cpus": "8+", "accelerators": "A100:1"}
    machine = {
        "SKYPILOT_NUM_NODES": "3",
        "SKYPILOT_NODE_RANK": "1",
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2\n10.0.0.3",
    }
    words = in_a_shell(task["run"], PATH="/usr/bin:/bin", **machine)
    assert words[:5] == shlex.split(
        "--nnodes=3 --nproc_per_node=2 --node_rank=1 --master_addr=10.0.0.1 --master_port=29500"
    )
    assert words[5:] == ["-m", "lightning_fl", *STARTED]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["slurm", "--silos", "0", *FIT], "must be at least 1"),
        (["slurm", "--silos", "3"], "Name the configuration"),
        (["slurm", "--silos", "3", *FIT, "--trainer.devices", "4"], "is set by --silos and --nproc"),
        (["slurm", "--silos", "3", *FIT, "--time", "soon"], "must have a form such as 30"),
        (["slurm", "--silos", "3", *FIT, "--partition", "a\nrm -rf /"], "is not a partition name"),
        (["slurm", "--silos", "3", *FIT, "--gpus", "A100"], "must be a number for slurm"),
        (["slurm", "--silos", "3", *FIT, "--image", "a"], "option of kubernetes"),
        (["slurm", "--silos", "3", *FIT, "--name", "My Job"], "lower-case letters"),
        (["kubernetes", "--silos", "3", *FIT], "needs --image"),
        (["kubernetes", "--silos", "3", *FIT, "--time", "30"], "option of slurm"),
        (["skypilot", "--silos", "3", *FIT, "--gpus", "2"], "must name a GPU type"),
    ],
)
def test_what_makes_no_job_is_one_line(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["launch", *words])
    assert sentence in capsys.readouterr().err
