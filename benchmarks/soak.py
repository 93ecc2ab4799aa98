"""Silos and a coordinator that are killed at random: the model is that of the recorded participation, bit for bit.

Each silo's update depends on the model and on how often its updates have counted, which it keeps as client state. So an
update that is lost, counts twice, or belongs to another round changes the model, and the replay finds it.

    python benchmarks/soak.py --silos 6 --rounds 200 --kill-every 3
    python benchmarks/soak.py --silos 6 --rounds 200 --kill-every 3 --buffered 3
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import types
from dataclasses import replace
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
from lightning_fl.communication import LocalGroup, Message
from lightning_fl.coordinator import wire
from lightning_fl.coordinator.audit import AuditLog, verify
from lightning_fl.coordinator.http_server import HttpServer
from lightning_fl.coordinator.identity import Authority, Kit, make_request
from lightning_fl.coordinator.kinds import kind_of
from lightning_fl.coordinator.machine import Rules
from lightning_fl.coordinator.silo import Introduction, NetworkFederation
from lightning_fl.coordinator.store import Store
from lightning_fl.engines.tensors import FederatedTensors
from lightning_fl.federation import FederationSettings, FederationState, RankReport, ServerRound
from lightning_fl.federation.server import close_server, update_template
from lightning_fl.schedules import Buffered, Polynomial
from lightning_fl.tree import flatten
from lightning_fl.types import Tree, Update

DEADLINE_S = 20.0
QUARTERS = 4


def names(number: int) -> tuple[str, ...]:
    return tuple(f"silo{index:02d}" for index in range(number))


def settings(args: argparse.Namespace) -> FederationSettings:
    schedule = Buffered(args.buffered, staleness=Polynomial(0.5), max_staleness=4) if args.buffered else None
    return FederationSettings(FedAvg(), WeightedMean(), (), "examples", 0, args.silos, schedule=schedule)


def update_of(name: str, params: Tree, count: int, round: int) -> Update:
    """What a silo contributes: it depends on the model, and on how often it has counted before."""
    goal = float(name.removeprefix("silo"))
    delta = 0.1 * (goal - params["x"]) + 0.01 * count + 0.001 * round
    return Update({"x": delta}, weight=1.0 + goal)


# ---- the processes


async def coordinate(folder: Path, args: argparse.Namespace) -> None:
    own = names(args.silos)
    fewest = max(1, (args.buffered or args.silos) // 2)
    rules = Rules(own, args.rounds, fewest, 2.0, DEADLINE_S, 2 * DEADLINE_S, 10.0)
    store = Store(folder / "federation")
    federation, audit = settings(args), AuditLog(store.root / "audit.jsonl")
    coordinator = kind_of(federation)(federation, {}, rules, store, audit, time.monotonic())
    server = HttpServer(coordinator, Kit(folder / "ca" / "coordinator"))
    await server.start("127.0.0.1", args.port)
    await server.run()


def take_part(folder: Path, args: argparse.Namespace, name: str) -> None:
    module = nn.Module()
    module.x = nn.Parameter(torch.zeros(args.size))
    federation = NetworkFederation(f"https://127.0.0.1:{args.port}", folder / name)
    store = federation.store = ClientStore()
    own = settings(args)
    federation.join(FederatedTensors(module), Introduction(is_asynchronous=bool(args.buffered)))
    federation.folder.restore(store)
    done = -1
    while (opening := federation.open_round(done)) is not None:
        params = opening.state.server["params"]
        time.sleep(random.random() * args.train)
        count = int((store.get(name) or {"count": torch.tensor(0)})["count"])
        store.stage(name, {"count": torch.tensor(count + 1)})
        ctx = RoundContext(opening.round, opening.cohort, args.silos)
        opened = ServerRound(own, opening.state, {}, update_template(own, params, {}), ctx)
        outcome, _ = federation.merge(opened, update_of(name, params, count, opening.round), RankReport(num_steps=1))
        store.commit()
        done = outcome["round"]
    federation.leave("the federation is over")


# ---- the one that kills them


def soak(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Runs a federation to its end while its processes are killed; returns what was seen."""
    authority = Authority.create(folder / "ca", "soak", ["127.0.0.1"])
    for name in names(args.silos):
        _, _, issued = authority.approve(make_request(folder / name, name))
        for file in ("cert.pem", "ca.pem"):
            shutil.copy(issued / file, folder / name / file)
    roles = ["coordinator", *names(args.silos)]
    running: dict[str, Any] = {}
    since: dict[str, int] = {}
    fork = multiprocessing.get_context("fork")  # with torch imported, so that a process comes back at once

    def start(role: str, round: int = 0) -> None:
        running[role], since[role] = fork.Process(target=play, args=(role, folder, args)), round
        running[role].start()

    kills, started, rng = dict.fromkeys(roles, 0), time.monotonic(), random.Random(args.seed)
    peaks = [0] * QUARTERS
    next_kill = started
    try:
        for role in roles:
            start(role)
        while (round := (state := read_state(folder)).get("round", 0)) < args.rounds:
            if time.monotonic() - started > args.patience:
                raise SystemExit(f"stuck in round {round}; see {folder / 'log'}")
            for role, process in list(running.items()):
                if process.exitcode == -signal.SIGKILL:
                    start(role, round)
                elif process.exitcode:
                    raise SystemExit(f"{role} ended with code {process.exitcode}; see {folder / 'log'}")
            # Once a round: on a busy machine nobody would ever come to work.
            ready = [role for role in roles if since[role] < round]
            if state and ready and time.monotonic() > next_kill:
                role = rng.choice(ready)
                running[role].kill()
                kills[role] += 1
                next_kill = time.monotonic() + rng.expovariate(1 / args.kill_every)
            quarter = QUARTERS * round // args.rounds
            peaks[quarter] = max(peaks[quarter], rss(running["coordinator"].pid))
            time.sleep(0.05)
    finally:
        for process in running.values():
            process.kill()
            process.join()
    seconds = time.monotonic() - started
    return {
        "kills": sum(kills.values()),
        "of the coordinator": kills["coordinator"],
        "seconds": seconds,
        "peaks": peaks,
    }


def play(role: str, folder: Path, args: argparse.Namespace) -> None:
    """Is one of the processes."""
    log = os.open(folder / "log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    random.seed()  # from the operating system: they shall not all train for the same time
    if role == "coordinator":
        asyncio.run(coordinate(folder, args))
    else:
        take_part(folder, args, role)


def read_state(folder: Path) -> dict[str, Any]:
    path = folder / "federation" / "state.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def rss(pid: int) -> int:
    """Resident memory of a process in bytes."""
    try:
        words = Path(f"/proc/{pid}/statm").read_text(encoding="utf-8").split()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(words[1]) * resource.getpagesize() if words else 0


def replay(folder: Path, args: argparse.Namespace) -> int:
    """Trains what the audit log says again, in one process; returns the number of rounds.

    Raises:
        SystemExit: If a round's model is another one.
    """
    path = folder / "federation" / "audit.jsonl"
    verify(path)
    closed = [
        event
        for event in map(json.loads, path.read_text(encoding="utf-8").splitlines())
        if event["event"] == "round closed"
    ]
    # A crash between the commit and its line in the log leaves a round without a line: the history has them all.
    history = read_state(folder)["progress"]["history"]
    own, counts = settings(args), dict.fromkeys(names(args.silos), 0)
    stale = () if own.schedule is None else own.schedule.transforms
    models: dict[int, Tree] = {}
    state = FederationState({"params": {"x": torch.zeros(args.size)}})
    states = {event["round"]: event["state"] for event in closed}
    for entry in history:
        round = entry["round"]
        ctx = RoundContext(round, entry["members"], args.silos)
        template = update_template(own, state.server["params"], {})
        acc = own.aggregator.init(template, torch.device("cpu"))
        models[round] = state.server["params"]
        for name in entry["members"]:
            version = entry.get("versions", {}).get(name, round)
            update = update_of(name, models[version], counts[name], version)
            for transform in stale:
                update, _ = transform.client(update, {}, replace(ctx, staleness=round - version))
            acc = own.aggregator.add(acc, update, ctx)
            counts[name] += 1
        models.pop(round - 5, None)
        acc, _ = own.aggregator.merge(acc, LocalGroup(), Message(), ctx)
        joined = RankReport(num_clients=len(entry["members"]))
        state = close_server(ServerRound(own, state, {}, template, ctx), acc, joined).state
        digest = wire.write(folder / "replayed", flatten({"server": state.server, "buffers": {}}))
        if states.get(round, digest) != digest:
            raise SystemExit(f"The model of round {round} is not that of the recorded participation.")
    if read_state(folder)["shared"] != digest:
        raise SystemExit("The last model is not that of the recorded participation.")
    return len(history)


def main(words: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where all files go, else a temporary folder")
    parser.add_argument("--silos", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--size", type=int, default=250_000, help="elements of the model")
    parser.add_argument("--buffered", type=int, default=0, help="updates with which an asynchronous round closes")
    parser.add_argument("--kill-every", type=float, default=5.0, help="seconds between kills, on average")
    parser.add_argument("--train", type=float, default=0.2, help="seconds of local training, at most")
    parser.add_argument("--patience", type=float, default=7200.0)
    parser.add_argument("--port", type=int, default=28443)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(words)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="soak") as folder:
        place = args.folder or Path(folder)
        place.mkdir(exist_ok=True)
        seen = soak(place, args)
        rounds = replay(place, args)
    mib = ", ".join(f"{peak / 2**20:.0f}" for peak in seen["peaks"])
    print(
        f"{rounds} rounds of {args.silos} silos in {seen['seconds']:.0f} s, {seen['kills']} kills -9, "
        f"{seen['of the coordinator']} of them of the coordinator: the model equals the replay bit for bit. "
        f"Peak memory of the coordinator in each quarter of the rounds: {mib} MiB."
    )
    return seen


if __name__ == "__main__":
    main()
