"""A cluster of Slurm on this machine, with several nodes that are one."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

from tests.helpers.distributed import PATIENCE, REPOSITORY, launches
from tests.helpers.network import wait_until

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol", "squeue", "sinfo")
HAS_SLURM = os.geteuid() == 0 and all(map(shutil.which, PROGRAMS))
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmdSpoolDir={folder}/spool-%n
StateSaveLocation={folder}/state
SlurmUser=root
SlurmdUser=root
AuthInfo=socket={folder}/munge.socket
SlurmdParameters=config_overrides
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PartitionName=main Nodes=ALL Default=YES State=UP
"""


class Slurm:
    """A controller and nodes; they end with the context.

    Args:
        folder: Where their files go.
        num_nodes: How many nodes there are.
    """

    def __init__(self, folder: Path, num_nodes: int) -> None:
        self.folder = folder
        self.names = [f"n{index}" for index in range(num_nodes)]
        self.environment = {
            **os.environ,
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(REPOSITORY),
            "MASTER_ADDR": "127.0.0.1",  # the nodes' names lead nowhere
        }
        self._running: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Slurm:
        (self.folder / "state").mkdir(parents=True)
        port, *ports = free_ports(1 + len(self.names))
        host = socket.gethostname()
        nodes = [
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={own} CPUs=1\n"
            for name, own in zip(self.names, ports, strict=True)
        ]
        config = CONFIG.format(host=host, port=port, folder=self.folder)
        (self.folder / "slurm.conf").write_text(config + "".join(nodes))
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        names = {"key-file": "munge.key", "socket": "munge.socket", "seed-file": "munge.seed", "pid-file": "munge.pid"}
        files = [f"--{option}={self.folder / name}" for option, name in names.items()]
        self._start("munged", *files, "--force", "--foreground")
        wait_until((self.folder / "munge.socket").exists, "munge")
        self._start("slurmctld", "-D")
        for name in self.names:
            self._start("slurmd", "-D", "-N", name)
        wait_until(lambda: self("sinfo", "-h", "-t", "idle", "-o", "%D") == str(len(self.names)), "idle nodes")
        return self

    def __exit__(self, *error: object) -> None:
        for process in reversed(self._running):
            process.kill()
            process.wait(PATIENCE)

    def _start(self, *words: str) -> None:
        launches.append(words[0])
        with (self.folder / f"{words[0]}-{words[-1]}.log").open("wb") as log:
            self._running.append(subprocess.Popen(words, env=self.environment, stdout=log, stderr=log))

    def __call__(self, *words: str, cwd: Path | None = None) -> str:
        """What a command prints."""
        done = subprocess.run(
            words, env=self.environment, cwd=cwd, capture_output=True, text=True, check=False, timeout=PATIENCE
        )
        return done.stdout.strip()

    def state(self, job: str) -> str:
        """The state of a job; empty when it has left the queue."""
        return self("squeue", "-h", "-j", job, "-o", "%T")


def free_ports(number: int) -> list[int]:
    """Ports on which nobody listens."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [own.getsockname()[1] for own in sockets]
    for own in sockets:
        own.close()
    return ports
