"""A coordinator and four silos, each in a network of its own that lets nothing in, train the model of one process."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_fl as fl
from lightning_fl import FederatedStrategy
from lightning_fl.coordinator.identity import Authority
from tests.helpers.distributed import PATIENCE, REPOSITORY
from tests.helpers.network import make_kit, wait_until
from tests.helpers.training import Plain, trainer, weights

NAMES = ("east", "north", "south", "west")
ADDRESS, PORT = "10.77.0.1", 8443
CASES: dict[str, dict[str, Any]] = {
    "fedavg": {"algorithm": "fedavg"},
    "scaffold": {"algorithm": "scaffold"},
    "fedadam": {"algorithm": "fedadam"},
    "personal head": {"algorithm": "fedavg", "personal": ["net.4.*"]},
}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.geteuid() != 0 or not (shutil.which("ip") and shutil.which("iptables")),
        reason="namespaces need root, iproute2 and iptables",
    ),
]


class Digits(Plain):
    """A small network with BatchNorm on the digits."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(dtype)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(
                nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10)
            ).to(dtype)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss)
        return loss


def loader_of(name: str) -> DataLoader[Any]:
    x, y = load_digits(return_X_y=True)
    index = NAMES.index(name)
    chosen = slice(index, 200 * (index + 1), 4)  # silos of 50, 100, 150 and 200 examples
    data = TensorDataset(torch.from_numpy(x[chosen] / 16), torch.from_numpy(y[chosen]))
    return DataLoader(data, batch_size=10, shuffle=True)


def train_silo(folder: str, name: str, case: str, dtype: str) -> None:
    """What the process of a silo does."""
    module = Digits(getattr(torch, dtype))
    kit = Path(folder) / name
    strategy = FederatedStrategy(federation=f"https://{ADDRESS}:{PORT}", kit=kit, **CASES[case])
    trainer(strategy, max_epochs=3).fit(module, loader_of(name))
    torch.save(weights(module), Path(folder) / f"{name}.pt")


def run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True, text=True)


class Networks:
    """Namespaces on one switch. A host takes in what it has asked for; the first one, calls to the coordinator too."""

    def __init__(self, *hosts: str) -> None:
        self.prefix = f"fl{os.getpid()}"
        self.hosts = hosts

    def __enter__(self) -> Networks:
        switch = self.space("switch")
        run("ip", "netns", "add", switch)
        run("ip", "-n", switch, "link", "add", "bridge", "type", "bridge")
        run("ip", "-n", switch, "link", "set", "bridge", "up")
        for number, host in enumerate(self.hosts, start=1):
            space = self.space(host)
            run("ip", "netns", "add", space)
            ends = "link", "add", "eth0", "netns", space, "type", "veth", "peer", "name", f"to{number}", "netns", switch
            run("ip", *ends)
            run("ip", "-n", switch, "link", "set", f"to{number}", "master", "bridge", "up")
            run("ip", "-n", space, "addr", "add", f"10.77.0.{number}/24", "dev", "eth0")
            for link in ("lo", "eth0"):
                run("ip", "-n", space, "link", "set", link, "up")
            self.iptables(host, "-P", "INPUT", "DROP")
            self.iptables(host, "-A", "INPUT", "-i", "lo", "-j", "ACCEPT")
            self.iptables(host, "-A", "INPUT", "-m", "conntrack", "--ctstate", "ESTABLISHED", "-j", "ACCEPT")
        self.iptables(self.hosts[0], "-A", "INPUT", "-p", "tcp", "--dport", str(PORT), "-j", "ACCEPT")
        return self

    def __exit__(self, *error: object) -> None:
        for host in ("switch", *self.hosts):
            subprocess.run(["ip", "netns", "del", self.space(host)], check=False, capture_output=True)

    def space(self, host: str) -> str:
        return f"{self.prefix}{host}"

    def iptables(self, host: str, *words: str) -> None:
        run("ip", "netns", "exec", self.space(host), "iptables", *words)

    def cut(self, host: str, seconds: float) -> None:
        """Takes a host's cable out for a while."""
        run("ip", "-n", self.space(host), "link", "set", "eth0", "down")
        time.sleep(seconds)
        run("ip", "-n", self.space(host), "link", "set", "eth0", "up")

    def start(self, host: str, log: Path, *words: str) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
        command = ["ip", "netns", "exec", self.space(host), sys.executable, *words]
        with log.open("wb") as file:
            return subprocess.Popen(command, stdout=file, stderr=file, env=environment, cwd=log.parent)


@pytest.fixture
def networks() -> Iterator[Networks]:
    with Networks("coordinator", *NAMES) as own:
        yield own


@pytest.fixture
def start(networks: Networks, tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    running: list[subprocess.Popen[bytes]] = []

    def begin(host: str, *words: str) -> subprocess.Popen[bytes]:
        running.append(networks.start(host, tmp_path / f"{host}.log", *words))
        return running[-1]

    yield begin
    for process in running:
        process.send_signal(signal.SIGKILL)
        process.wait()


def test_nothing_reaches_a_silo(networks: Networks) -> None:
    code = "import socket; socket.create_connection(('10.77.0.2', 22), timeout=1)"
    words = ["ip", "netns", "exec", networks.space("coordinator"), sys.executable, "-c", code]
    assert "TimeoutError" in subprocess.run(words, check=False, capture_output=True, text=True).stderr


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("case", CASES)
def test_silos_behind_firewalls_give_what_one_process_gives(
    networks: Networks, start: Callable[..., Any], tmp_path: Path, case: str, dtype: str
) -> None:
    authority = Authority.create(tmp_path / "ca", "demo", [ADDRESS])
    for name in NAMES:
        make_kit(authority, tmp_path / name, name)
    strategy = {"class_path": "lightning_fl.FederatedStrategy", "init_args": CASES[case]}
    (tmp_path / "train.yaml").write_text(yaml.safe_dump({"trainer": {"strategy": strategy}}))
    federation = {"silos": list(NAMES), "rounds": 3, "kit": "ca/coordinator", "folder": "federation", "port": PORT}
    (tmp_path / "federation.yaml").write_text(yaml.safe_dump({**federation, "gather_s": PATIENCE}))
    files = "--config", "train.yaml", "--federation", "federation.yaml"
    start("coordinator", "-m", "lightning_fl", "coordinator", *files)
    code = "from tests.coordinator.test_namespaces import train_silo; import sys; train_silo(*sys.argv[1:])"
    silos = [start(name, "-c", code, str(tmp_path), name, case, dtype) for name in NAMES]
    audit = tmp_path / "federation" / "audit.jsonl"
    wait_until(lambda: audit.exists() and "round opened" in audit.read_text(), "the first round")
    networks.cut("east", 3.0)
    for name, process in zip(NAMES, silos, strict=True):
        assert process.wait(PATIENCE) == 0, (tmp_path / f"{name}.log").read_text()[-2000:]
    module = Digits(getattr(torch, dtype))
    clients = fl.datamodules.ClientLoaders({name: loader_of(name) for name in NAMES})
    trainer(FederatedStrategy(engine="sequential", **CASES[case]), max_epochs=3).fit(module, clients)
    rtol = 1e-9 if dtype == "float64" else 1e-6
    for name in NAMES:
        found = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        torch.testing.assert_close(found, weights(module), rtol=rtol, atol=rtol)
    closed = [event for event in map(json.loads, audit.read_text().splitlines()) if event["event"] == "round closed"]
    assert [sorted(event["members"]) for event in closed] == [list(NAMES)] * 3


MEMBER = """
import torch
from lightning_fl.communication.rendezvous import launched_group
group = launched_group()
print("sum", group.all_reduce(torch.tensor([group.rank + 1.0])).item(), flush=True)
"""


def test_torchrun_on_two_machines_whose_own_names_lead_nowhere(
    networks: Networks, start: Callable[..., Any], tmp_path: Path
) -> None:
    hosts = "coordinator", "east"
    (tmp_path / "member.py").write_text(MEMBER)
    for host in hosts:  # machines of one organisation let each other in
        networks.iptables(host, "-A", "INPUT", "-s", "10.77.0.0/24", "-j", "ACCEPT")
    words = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1", "--master_addr", ADDRESS]
    ranks = [
        start(host, *words, "--master_port", "29500", "--node_rank", str(rank), "member.py")
        for rank, host in enumerate(hosts)
    ]
    for host, process in zip(hosts, ranks, strict=True):
        assert process.wait(PATIENCE) == 0, (tmp_path / f"{host}.log").read_text()[-2000:]
        assert "sum 3.0" in (tmp_path / f"{host}.log").read_text()
