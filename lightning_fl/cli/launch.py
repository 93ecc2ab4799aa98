"""Prints a job file that starts a federation of silos on a cluster: slurm, kubernetes or skypilot.

Nothing is submitted; the first lines of the file say how to submit it. Each rank is a silo that reads its own data. All
other options are passed to `lightning-fl fit`.

Examples:
  lightning-fl launch slurm --silos 3 --config silos.yaml --cpus 8 --time 12:00:00 > job.sh
  lightning-fl launch kubernetes --silos 3 --config silos.yaml --image example.org/lightning-fl:1 --out job.yaml
  lightning-fl launch skypilot --silos 3 --nproc 2 --config silos.yaml --gpus A100
"""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning_fl.cli.command import check_output
from lightning_fl.tracking.run import write_file

PASSES_OPTIONS_ON = True
PORT = 29500
SECONDS_BEFORE_REQUEUE = 90
TIME = re.compile(r"(\d+-)?\d{1,2}(:\d{2}){0,2}|\d+(:\d{2}){0,2}")
OWN = ("--trainer.num_nodes", "--trainer.devices")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's own options."""
    parser.add_argument("cluster", choices=tuple(WRITERS))
    parser.add_argument("--silos", type=int, required=True, help="machines")
    parser.add_argument("--nproc", type=int, default=1, help="ranks on each machine, each a silo (default: 1)")
    parser.add_argument("--name", default="lightning-fl", help="name of the job (default: %(default)s)")
    parser.add_argument("--cpus", type=int, help="CPU cores per rank")
    parser.add_argument("--gpus", help="GPUs per machine: a number; for skypilot a type, such as A100 or A100:2")
    parser.add_argument("--time", help="slurm: time limit, such as 12:00:00; the job is requeued before it and resumes")
    parser.add_argument("--partition", help="slurm: the partition")
    parser.add_argument("--image", help="kubernetes: the container image, as deploy/Dockerfile builds it")
    parser.add_argument("--runtime", help="kubernetes: the training runtime (default: torch-distributed)")
    parser.add_argument("--out", type=Path, help="the file (default: printed)")


def run(args: argparse.Namespace) -> None:
    """Prints the file, or writes it."""
    for option in ("silos", "nproc", "cpus"):
        if getattr(args, option) is not None and getattr(args, option) < 1:
            raise ValueError(f"--{option} {getattr(args, option)} must be at least 1.")
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?", args.name):
        raise ValueError(f"--name {args.name} must have at most 63 lower-case letters, digits and hyphens.")
    if "--config" not in args.rest:
        raise ValueError("Name the configuration with --config.")
    taken = next((word for word in args.rest if word.partition("=")[0] in OWN), None)
    if taken is not None:
        raise ValueError(f"{taken} is set by --silos and --nproc. Leave it out.")
    of_others = {"time": "slurm", "partition": "slurm", "image": "kubernetes", "runtime": "kubernetes"}
    for option, cluster in of_others.items():
        if getattr(args, option) is not None and args.cluster != cluster:
            raise ValueError(f"--{option} is an option of {cluster}, not of {args.cluster}.")
    text = WRITERS[args.cluster](args)
    if args.out is None:
        print(text, end="")
        return
    check_output(args.out)
    write_file(args.out, text)
    print(f"job file: {args.out}")


def fit(args: argparse.Namespace) -> list[str]:
    """The arguments of ``lightning-fl``."""
    # Lightning compares them with the processes that were started.
    return ["fit", *args.rest, "--trainer.num_nodes", str(args.silos), "--trainer.devices", str(args.nproc)]


def slurm(args: argparse.Namespace) -> str:
    """A batch script.

    Raises:
        ValueError: If a time or a number of GPUs is not valid.
    """
    if args.time is not None and not TIME.fullmatch(args.time):
        raise ValueError(f"--time {args.time} must have a form such as 30, 12:00:00 or 2-00:00:00.")
    if args.partition is not None and not re.fullmatch(r"[\w.,-]+", args.partition):
        raise ValueError(f"--partition {args.partition} is not a partition name.")
    options: dict[str, Any] = {
        "job-name": args.name,
        "partition": args.partition,
        "nodes": args.silos,
        "ntasks-per-node": args.nproc,  # Lightning counts its ranks by this, and refuses --ntasks
        "cpus-per-task": args.cpus,
        "gpus-per-node": _number_of_gpus(args),
        "time": args.time,
        "output": "%x-%j.out",
        "open-mode": "append",
        # On the signal, Lightning saves the round's start and requeues the job.
        "signal": f"SIGUSR1@{SECONDS_BEFORE_REQUEUE}",
    }
    lines = [f"#SBATCH --{name}={value}" for name, value in options.items() if value is not None]
    command = shlex.join(["lightning-fl", *fit(args)])
    return "\n".join(
        [
            "#!/bin/bash",
            *lines,
            "#SBATCH --requeue",
            "# Submit with: sbatch FILE. Before its time limit the job saves the round's start and is requeued.",
            "set -euo pipefail",
            'export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"',
            f"srun --kill-on-bad-exit=1 {command}",
            "",
        ]
    )


def kubernetes(args: argparse.Namespace) -> str:
    """A TrainJob of Kubeflow Trainer, whose runtime configures torchrun.

    Raises:
        ValueError: If there is no image, or the number of GPUs is not valid.
    """
    if args.image is None:
        raise ValueError(
            "A TrainJob needs --image, an image with lightning_fl and your code, such as deploy/Dockerfile builds."
        )
    needed: dict[str, Any] = {}
    if args.cpus is not None:
        needed["cpu"] = str(args.cpus * args.nproc)
    gpus = _number_of_gpus(args)
    if gpus is not None:
        needed["nvidia.com/gpu"] = str(gpus)
    trainer: dict[str, Any] = {
        "image": args.image,
        "numNodes": args.silos,
        "numProcPerNode": args.nproc,
        "command": ["torchrun", "-m", "lightning_fl", *fit(args)],
    }
    if needed:
        trainer["resourcesPerNode"] = {"requests": needed, "limits": needed}
    job = {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": {"name": args.name},
        "spec": {"runtimeRef": {"name": args.runtime or "torch-distributed"}, "trainer": trainer},
    }
    return "# Submit with: kubectl apply -f FILE. The cluster needs Kubeflow Trainer 2.\n" + _yaml(job)


def skypilot(args: argparse.Namespace) -> str:
    """A task of SkyPilot."""
    if args.gpus is not None and not re.fullmatch(r"[A-Za-z][\w-]*(:\d+)?", args.gpus):
        raise ValueError(f"--gpus {args.gpus} must name a GPU type for skypilot, such as A100 or A100:2.")
    resources: dict[str, Any] = {}
    if args.cpus is not None:
        resources["cpus"] = f"{args.cpus * args.nproc}+"
    if args.gpus is not None:
        resources["accelerators"] = args.gpus if ":" in args.gpus else f"{args.gpus}:1"
    where = [
        "torchrun",
        '--nnodes="$SKYPILOT_NUM_NODES"',
        f"--nproc_per_node={args.nproc}",
        '--node_rank="$SKYPILOT_NODE_RANK"',
        '--master_addr="$(echo "$SKYPILOT_NODE_IPS" | head -n1)"',
        f"--master_port={PORT}",
    ]
    task: dict[str, Any] = {
        "name": args.name,
        "num_nodes": args.silos,
        "workdir": ".",
        **({"resources": resources} if resources else {}),
        "setup": "pip install lightning-fl\n",
        "run": " \\\n  ".join([*where, shlex.join(["-m", "lightning_fl", *fit(args)])]) + "\n",
    }
    return "# Start with: sky launch FILE. The current folder is copied to every machine.\n" + _yaml(task)


def _number_of_gpus(args: argparse.Namespace) -> int | None:
    if args.gpus is None:
        return None
    if not args.gpus.isdecimal() or int(args.gpus) < 1:
        raise ValueError(f"--gpus {args.gpus} must be a number for {args.cluster}.")
    return int(args.gpus)


def _yaml(content: dict[str, Any]) -> str:
    import yaml

    class Dumper(yaml.SafeDumper):
        """Writes multi-line commands as blocks, and repeats equal parts instead of using aliases."""

        def ignore_aliases(self, data: Any) -> bool:
            return True

    def text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)

    Dumper.add_representer(str, text)
    return yaml.dump(content, Dumper=Dumper, sort_keys=False, width=110)


WRITERS: dict[str, Callable[[argparse.Namespace], str]] = {
    "slurm": slurm,
    "kubernetes": kubernetes,
    "skypilot": skypilot,
}
