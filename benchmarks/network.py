"""Rounds over the coordinator beside raw TLS on loopback: seconds, megabytes a second, memory, and what a kill costs.

Every silo and the coordinator is a process of its own; the model is one tensor, and nothing is trained. The raw figure
is what the same bytes take through as many TLS connections at once, up and down, in the same run. The silos map one
file as their update, so that eight of them with 400 MB take no more than 2 GB of memory beside the coordinator's.

    python benchmarks/network.py --megabytes 1 25 --silos 2 4 --rounds 3
    python benchmarks/network.py --megabytes 400 --silos 2 4 8 --rounds 2
    python benchmarks/network.py --megabytes 1 --silos 4 --kill
    python benchmarks/network.py --megabytes 400 --silos 1 --link 2 --rounds 2
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import types
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

# The rooms below the strategy need no Lightning, without which a process starts in half the time.
package = types.ModuleType("lightning_fl")
package.__path__ = [str(Path(__file__).parents[1] / "lightning_fl")]
package.__dict__["__version__"] = "benchmark"
sys.modules["lightning_fl"] = package

from lightning_fl.aggregation import RoundContext, WeightedMean
from lightning_fl.algorithms import FedAvg
from lightning_fl.clients import ClientStore
from lightning_fl.coordinator import identity
from lightning_fl.coordinator.audit import AuditLog
from lightning_fl.coordinator.http_server import HttpServer
from lightning_fl.coordinator.identity import Authority, Kit, make_request
from lightning_fl.coordinator.machine import Rules
from lightning_fl.coordinator.service import Coordinator
from lightning_fl.coordinator.silo import Introduction, NetworkFederation
from lightning_fl.coordinator.store import Store
from lightning_fl.engines.tensors import FederatedTensors
from lightning_fl.federation import FederationSettings, RankReport, ServerRound
from lightning_fl.federation.server import update_template
from lightning_fl.types import Update

HOST = "127.0.0.1"


def names(number: int) -> tuple[str, ...]:
    return tuple(f"silo{index:02d}" for index in range(number))


def settings(number: int) -> FederationSettings:
    return FederationSettings(FedAvg(), WeightedMean(), (), "examples", 0, number)


# ---- the processes


async def coordinate(folder: Path, args: argparse.Namespace) -> None:
    rules = Rules(names(args.silos), args.rounds, 1, 60.0, args.deadline, 3600.0, 60.0)
    store = Store(folder / "federation")
    audit = AuditLog(store.root / "audit.jsonl")
    server = HttpServer(
        Coordinator(settings(args.silos), {}, rules, store, audit, time.monotonic()), Kit(folder / "ca" / "coordinator")
    )
    await server.start(HOST, args.port)
    (store.root / "ready").touch()
    await server.run()


def mapped(file: Path, size: int) -> torch.Tensor:
    """A vector whose pages all silos share, so that many of them fit into this machine beside the coordinator."""
    return torch.from_file(str(file), shared=False, size=size)


def take_part(folder: Path, args: argparse.Namespace) -> None:
    module = nn.Module()
    module.x = nn.Parameter(mapped(folder / "zeros", args.size))
    federation = NetworkFederation(f"https://{HOST}:{args.link_port or args.port}", folder / args.role)
    federation.store = ClientStore()
    federation.join(FederatedTensors(module), Introduction())
    own, done = settings(args.silos), -1
    while (opening := federation.open_round(done)) is not None:
        params = opening.state.server["params"]
        if args.dies == args.role and opening.round == 1:
            time.sleep(3600)  # until it is killed in its training
        ctx = RoundContext(opening.round, opening.cohort, args.silos)
        opened = ServerRound(own, opening.state, {}, update_template(own, params, {}), ctx)
        update = Update({"x": mapped(folder / "ones", args.size)})
        outcome, _ = federation.merge(opened, update, RankReport(num_steps=1))
        done = outcome["round"]
    federation.leave("the federation is over")


class Link:
    """What stands between silos and the coordinator, and passes each connection so many bytes a second, each way.

    Args:
        port: The coordinator's port.
    """

    def __init__(self, port: int) -> None:
        self.target = port
        self.rate: float | None = None
        self._listener = socket.create_server((HOST, 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            near, _ = self._listener.accept()
            far = socket.create_connection((HOST, self.target))
            for ends in ((near, far), (far, near)):
                threading.Thread(target=self._pass_on, args=ends, daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)
                if self.rate is not None:
                    time.sleep(len(data) / self.rate)
            target.shutdown(socket.SHUT_WR)


# ---- measuring


class Processes:
    """A coordinator and its silos."""

    def __init__(self, folder: Path, args: argparse.Namespace) -> None:
        self.folder, self.args = folder, args
        self.log = (folder / "log").open("ab")
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.peak = 0.0
        authority = Authority.create(folder / "ca", "benchmark", [HOST])
        for name in names(args.silos):
            _, _, issued = authority.approve(make_request(folder / name, name))
            for file in ("cert.pem", "ca.pem"):
                shutil.copy(issued / file, folder / name / file)

    def start(self, role: str) -> None:
        options = ("silos", "rounds", "size", "port", "link_port", "deadline", "dies")
        words = [f"--{key.replace('_', '-')}={getattr(self.args, key)}" for key in options]
        command = [sys.executable, __file__, f"--role={role}", f"--folder={self.folder}", *words]
        self.running[role] = subprocess.Popen(command, stdout=self.log, stderr=self.log)

    def events(self, kind: str) -> list[dict[str, Any]]:
        path = self.folder / "federation" / "audit.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return [event for event in map(json.loads, lines) if event["event"] == kind]

    def wait_for(self, kind: str, count: int) -> None:
        while len(self.events(kind)) < count:
            if self.running["coordinator"].poll() is not None:
                raise SystemExit((self.folder / "log").read_text(encoding="utf-8")[-2000:])
            self.peak = max(self.peak, self.memory())
            time.sleep(0.02)

    def memory(self) -> float:
        """The coordinator's own memory in MB, without pages of files, which the system may take."""
        lines = Path(f"/proc/{self.running['coordinator'].pid}/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1000

    def end(self) -> None:
        for process in self.running.values():
            process.kill()
            process.wait()
        self.log.close()


def seconds_between(events: list[dict[str, Any]]) -> list[float]:
    times = [datetime.fromisoformat(event["time"]).timestamp() for event in events]
    return [after - before for before, after in pairwise(times)]


def measure(args: argparse.Namespace, megabytes: float) -> None:
    """Prints the figures of one size and number of silos."""
    args.size = int(megabytes * 250_000)
    with tempfile.TemporaryDirectory(prefix="network") as place:
        for name, value in (("zeros", 0.0), ("ones", 1.0)):
            with (Path(place) / name).open("wb") as file:
                torch.full((args.size,), value).numpy().tofile(file)
        processes = Processes(Path(place), args)
        try:
            processes.start("coordinator")
            while not (Path(place) / "federation" / "ready").exists():
                time.sleep(0.05)
            start = processes.memory()
            link = Link(args.port) if args.link else None
            args.link_port = 0 if link is None else link.port
            for role in names(args.silos):
                processes.start(role)
            # The first round waits for the processes to start.
            processes.wait_for("round closed", 1)
            if args.dies:
                processes.wait_for("round opened", 2)
                processes.running[args.dies].kill()
                killed = time.time()
                processes.wait_for("round closed", 2)
                closed = datetime.fromisoformat(processes.events("round closed")[1]["time"]).timestamp()
                print(
                    f"{args.silos} silos, {megabytes:g} MB, deadline {args.deadline:g} s: {closed - killed:.1f} s from "
                    "a kill -9 in training to the next finished round"
                )
                return
            if link is not None:
                link.rate = 1e6 * args.link
            processes.wait_for("round closed", args.rounds)
            peak = processes.peak - start
            closed = processes.events("round closed")
            rounds, lost = seconds_between(closed), sum(len(event["lost"]) for event in closed)
            raw = raw_tls(Path(place), args.silos, args.size * 4)
        finally:
            processes.end()
    best, moved = min(rounds), 2 * args.silos * megabytes
    if args.link:
        print(
            f"{args.silos} silos, {megabytes:g} MB over links of {args.link:g} MB/s: {best:.0f} s for a round "
            f"({2 * megabytes / args.link:.0f} s are the link's), deadline {args.deadline:g} s; {lost} updates lost; "
            f"peak {peak:.0f} MB",
            flush=True,
        )
        return
    bound = 1.5 * megabytes + 200
    print(
        f"| {megabytes:g} MB x {args.silos} | {best:.2f} s | {moved / best:.0f} MB/s "
        f"| {raw:.2f} s | {moved / raw:.0f} MB/s | {peak:.0f} MB (bound {bound:.0f}) |",
        flush=True,
    )


def raw_tls(folder: Path, silos: int, size: int) -> float:
    """Seconds in which as many TLS connections at once carry the same bytes up and down."""
    context = identity.server_context(Kit(folder / "ca" / "coordinator"), lambda reason: None)
    piece = bytes(1 << 20)
    listener = socket.create_server((HOST, 0))

    def receive(connection: ssl.SSLSocket) -> None:
        left, buffer = size, bytearray(1 << 20)
        while left:
            left -= connection.recv_into(buffer, min(left, len(buffer)))

    def send(connection: ssl.SSLSocket) -> None:
        left = size
        while left:
            left -= connection.send(piece[: min(left, len(piece))])

    def serve(plain: socket.socket) -> None:
        with context.wrap_socket(plain, server_side=True) as connection:
            receive(connection)
            send(connection)

    def accept() -> None:
        for _ in range(silos):
            threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

    def call(name: str) -> None:
        plain = socket.create_connection((HOST, listener.getsockname()[1]))
        with identity.client_context(Kit(folder / name)).wrap_socket(plain, server_hostname=HOST) as connection:
            send(connection)
            receive(connection)

    threading.Thread(target=accept, daemon=True).start()
    started = time.perf_counter()
    callers = [threading.Thread(target=call, args=(name,)) for name in names(silos)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    listener.close()
    return time.perf_counter() - started


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--role", default="")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--megabytes", type=float, nargs="+", default=[1.0, 25.0])
    parser.add_argument("--silos", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--size", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--dies", default="", help=argparse.SUPPRESS)
    parser.add_argument("--kill", action="store_true", help="measure how long a kill -9 holds the federation up")
    parser.add_argument(
        "--link", type=float, default=0.0, help="megabytes a second of each silo's link, from round 1 on"
    )
    parser.add_argument("--link-port", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, default=10.0, help="deadline_s of a round")
    parser.add_argument("--port", type=int, default=28544)
    args = parser.parse_args(words)
    torch.set_num_threads(1)
    if args.role:
        args.silos = args.silos[0]
        if args.role == "coordinator":
            asyncio.run(coordinate(args.folder, args))
        else:
            take_part(args.folder, args)
        return
    if not args.kill:
        # Over a slow link only what comes in puts the end of a round off.
        args.deadline = 60.0 if args.link else 3600.0
    if not args.kill and not args.link:
        print("| model x silos | round | | raw TLS | | coordinator's peak, beside what it has at its start |")
        print("|---|---|---|---|---|---|", flush=True)
    for megabytes in args.megabytes:
        for silos in args.silos:
            own = argparse.Namespace(**{**vars(args), "silos": silos})
            own.dies = names(silos)[-1] if args.kill else ""
            measure(own, megabytes)


if __name__ == "__main__":
    main()
