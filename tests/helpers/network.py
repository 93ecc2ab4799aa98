"""A coordinator in a thread, silos' kits, and silos without Lightning; importable in worker processes."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_fl.aggregation import Aggregator, RoundContext, Transform, WeightedMean
from lightning_fl.algorithms import Algorithm, FedAvg
from lightning_fl.clients import ClientStore
from lightning_fl.coordinator.audit import AuditLog
from lightning_fl.coordinator.client import Client
from lightning_fl.coordinator.disk import Disk
from lightning_fl.coordinator.http_server import HttpServer
from lightning_fl.coordinator.identity import Authority, Kit, make_request
from lightning_fl.coordinator.kinds import kind_of
from lightning_fl.coordinator.machine import Rules
from lightning_fl.coordinator.silo import Introduction, NetworkFederation
from lightning_fl.coordinator.store import Store
from lightning_fl.engines.tensors import FederatedTensors, load
from lightning_fl.federation import FederationSettings, RankReport, ServerRound
from lightning_fl.federation.server import update_template
from lightning_fl.privacy.secagg import SecureAggregation
from lightning_fl.privacy.secagg.keys import KeyFolder
from lightning_fl.types import Update
from tests.helpers.distributed import PATIENCE

HOST = "localhost"
NAMES = ("east", "north", "south")
ENTRY = {
    "fx": "validation_step",
    "name": "loss",
    "prog_bar": False,
    "logger": True,
    "on_step": False,
    "on_epoch": True,
    "reduction": "mean",
    "add_dataloader_idx": True,
    "dataloader_idx": None,
    "metric_attribute": None,
    "is_tensor": True,
    "dtype": "float32",
    "value": float("nan"),
    "weight": 8.0,
}
"""A logged value as silos report it."""
EVALUATION: dict[str, Any] = {"metrics": {}, "metric_states": {}}
"""What a silo reports of an evaluation in which nothing was logged."""
_connections: list[Client] = []
"""Of silos that a test has left behind."""


def make_kits(folder: Path, names: Sequence[str] = NAMES) -> Authority:
    """An authority in ``folder/ca`` and a kit for each silo in ``folder/<name>``."""
    authority = Authority.create(folder / "ca", "demo", [HOST, "127.0.0.1", "::1"])
    for name in names:
        make_kit(authority, folder / name, name)
    return authority


def make_kit(authority: Authority, kit: Path, name: str, **options: Any) -> Kit:
    _, _, issued = authority.approve(make_request(kit, name), **options)
    for file in ("cert.pem", "ca.pem"):
        shutil.copy(issued / file, kit / file)
    return Kit(kit)


def settings(
    algorithm: Algorithm | None = None, transforms: Sequence[Transform] = (), aggregator: Aggregator | None = None
) -> FederationSettings:
    own = algorithm or FedAvg()
    return FederationSettings(own, aggregator or WeightedMean(), tuple(transforms), own.weighting, 0, len(NAMES))


def rules(**options: Any) -> Rules:
    patient = {"gather_s": PATIENCE, "deadline_s": PATIENCE, "max_deadline_s": PATIENCE, "evaluation_s": PATIENCE}
    return Rules(**{"silos": NAMES, "rounds": 3, **patient, **options})


def make_keys(folder: Path, names: Sequence[str] = NAMES) -> None:
    """An identity for secure sums in the kit of each silo, which trusts those of all others."""
    keys = {name: KeyFolder(folder / name / "keys") for name in names}
    public = [own.create(name) for name, own in keys.items()]
    for own in keys.values():
        own.trust(public)


class LiveCoordinator:
    """A coordinator that serves from a thread, and can be ended and started again.

    Args:
        folder: Its folder is ``folder/federation``, its kit ``folder/ca/coordinator``.
        rules: When rounds open and close.
        settings: The federation's settings.
        expected: The settings that silos must have.
        before: Called before each change of its folder.
        host: The address on which it listens. None: all.
        port: Its port; 0 for any.
        admin_port: The port on 127.0.0.1 for those who run it. None: none.
    """

    def __init__(
        self,
        folder: Path,
        rules: Rules,
        settings: FederationSettings,
        expected: dict[str, str] | None = None,
        before: Callable[[str], None] = lambda operation: None,
        host: str | None = "127.0.0.1",
        port: int = 0,
        admin_port: int | None = None,
    ) -> None:
        self.folder, self.rules, self.settings, self.expected = folder, rules, settings, expected or {}
        self.before, self.host, self.port, self.admin_port = before, host, port, admin_port
        self.error: BaseException | None = None
        self.start()

    def start(self) -> None:
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self._thread.start()
        assert self._started.wait(PATIENCE)
        if self.error is not None:
            raise self.error

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        try:
            self.store = Store(self.folder / "federation", Disk(self.before))
        except ValueError as error:
            self.error = error
            self._started.set()
            return
        try:
            audit = AuditLog(self.store.root / "audit.jsonl")
            kind = kind_of(self.settings)
            self.coordinator = kind(self.settings, self.expected, self.rules, self.store, audit, time.monotonic())
            self.server = HttpServer(self.coordinator, Kit(self.folder / "ca" / "coordinator"))
            self.port = await self.server.start(self.host, self.port, self.admin_port)
            self._task = asyncio.create_task(self.server.run())
            self._started.set()
            await self._task
        except asyncio.CancelledError:
            pass
        except BaseException as error:
            self.error = error
        finally:
            self._started.set()
            await self.server.stop()
            self.store.close()

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()

    def restart(self) -> None:
        self.stop()
        self.start()

    @property
    def address(self) -> str:
        return f"https://{HOST}:{self.port}"

    def events(self, *kinds: str) -> list[dict[str, Any]]:
        path = self.folder / "federation" / "audit.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        found = [read_line(line) for line in lines]
        return [event for event in found if not kinds or event["event"] in kinds]

    def wait_for(self, kind: str, count: int = 1) -> None:
        wait_until(lambda: len(self.events(kind)) >= count, f"{count} x {kind!r} in the audit log")


def read_line(line: str) -> dict[str, Any]:
    import json

    found = json.loads(line)
    assert isinstance(found, dict)
    return found


def wait_until(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < deadline, f"never came: {what}"
        time.sleep(0.02)


@contextmanager
def live_coordinator(folder: Path, *args: Any, **options: Any) -> Iterator[LiveCoordinator]:
    live = LiveCoordinator(folder, *args, **options)
    try:
        yield live
    finally:
        live.stop()
        while _connections:
            _connections.pop().close()
    if live.error is not None:
        raise live.error


class Relay:
    """What stands between silos and a coordinator and has one address for all of them, such as a NAT.

    Args:
        port: The coordinator's port.
        rate: Bytes a second that each connection passes, each way. None: any.
    """

    def __init__(self, port: int, rate: float | None = None) -> None:
        self.target, self.rate = port, rate
        self.num_bytes = 0
        self._sockets: list[socket.socket] = []
        self._left: dict[socket.socket, int] = {}
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def __enter__(self) -> Relay:
        return self

    def __exit__(self, *error: object) -> None:
        self._listener.close()
        self.cut()

    @property
    def address(self) -> str:
        return f"https://{HOST}:{self.port}"

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self.target))
                self._sockets += [near, far]
                for source, target in ((near, far), (far, near)):
                    threading.Thread(target=self._pass_on, args=(source, target), daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if source in self._left:
                    data = data[: self._left[source]]
                    self._left[source] -= len(data)
                self.num_bytes += len(data)
                target.sendall(data)
                if self.rate is not None:
                    time.sleep(len(data) / self.rate)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def fall_silent(self, after: int) -> None:
        """Lets the open connections pass so many more bytes each way, then nothing, and tells neither side."""
        self._left = dict.fromkeys(self._sockets, after)

    def cut(self) -> int:
        """Ends all connections; returns how many there were."""
        sockets, self._sockets = self._sockets, []
        for end in sockets:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        return len(sockets) // 2


class ConnectProxy:
    """A forward proxy as organisations have them: it lets nothing through but CONNECT, for those who know the password.

    Args:
        user: User and password, ``name:password``. None: everybody may use it.
    """

    def __init__(self, user: str | None = None) -> None:
        self.user = user
        self.asked: list[str] = []
        self.num_bytes = 0
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)

    def __enter__(self) -> ConnectProxy:
        self._thread.start()
        assert self._ready.wait(PATIENCE)
        return self

    def __exit__(self, *error: object) -> None:
        self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join(PATIENCE)

    @property
    def address(self) -> str:
        return f"http://{self.user + '@' if self.user else ''}127.0.0.1:{self.port}"

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        server = await asyncio.start_server(self._connect, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._task = asyncio.create_task(asyncio.Event().wait())
        self._ready.set()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        server.close()

    async def _connect(self, near: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = (await near.readuntil(b"\r\n\r\n")).decode()
            words = head.split()
            self.asked.append(" ".join(words[:2]))
            password = base64.b64encode((self.user or "").encode()).decode()
            if self.user is not None and f"Basic {password}" not in head:
                back.write(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")
            elif words[0] != "CONNECT":
                back.write(b"HTTP/1.1 405 Method Not Allowed\r\nContent-Length: 0\r\n\r\n")
            else:
                host, _, port = words[1].rpartition(":")
                far, there = await asyncio.open_connection(host, int(port))
                back.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
                await asyncio.gather(self._pass_on(near, there), self._pass_on(far, back))
        back.close()

    async def _pass_on(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await source.read(1 << 16):
                self.num_bytes += len(data)
                target.write(data)
                await target.drain()
        target.close()


class Died(BaseException):
    """Stands for the end of a process."""


class TinySilo:
    """A silo without Lightning whose model is one tensor, and whose update is ``step`` in each element.

    Args:
        folder: Where its kit is, ``folder/<name>``.
        address: The coordinator's address.
        name: The silo.
        step: What it adds to the model.
        size: Elements of the model.
        aggregator: Secure aggregation. None: the coordinator sees its update.
        is_asynchronous: Whether rounds close without it.
    """

    def __init__(
        self,
        folder: Path,
        address: str,
        name: str,
        step: float = 1.0,
        size: int = 3,
        aggregator: SecureAggregation | None = None,
        is_asynchronous: bool = False,
    ) -> None:
        self.name, self.step, self.aggregator = name, step, aggregator
        self.is_asynchronous = is_asynchronous
        self.module = nn.Module()
        self.module.x = nn.Parameter(torch.zeros(size))
        self.settings = settings()
        self.federation = NetworkFederation(address, folder / name)
        self.store = self.federation.store = ClientStore()
        _connections.append(self.federation.client)
        self.done = -1
        self.reports: list[RankReport] = []
        self.num_examples = 1

    def join(self, expected: dict[str, str] | None = None, common: dict[str, str] | None = None) -> TinySilo:
        protections = [] if self.aggregator is None else ["secure aggregation"]
        tensors = FederatedTensors(self.module)
        own = Introduction(expected or {}, common or {}, {}, protections, self.aggregator)
        self.federation.join(tensors, replace(own, is_asynchronous=self.is_asynchronous))
        self.federation.folder.restore(self.store)
        return self

    def open(self) -> Any:
        opening = self.federation.open_round(self.done)
        if opening is not None:
            load(FederatedTensors(self.module).params, opening.state.server["params"])
        return opening

    def send(self, opening: Any, update: Update | None = None) -> float:
        """Sends its update and waits for the round; returns the new model's first element."""
        ctx = RoundContext(opening.round, opening.cohort, len(self.federation.silos))
        params = opening.state.server["params"]
        opened = ServerRound(self.settings, opening.state, {}, update_template(self.settings, params, {}), ctx)
        own = update or Update({"x": torch.full_like(params["x"], self.step)})
        # Counts the rounds in which its update has counted.
        counted = (self.store.get(self.name) or {}).get("counted", torch.tensor(0))
        self.store.stage(self.name, {"counted": counted + 1})
        outcome, self.reports = self.federation.merge(
            opened, own, RankReport(num_steps=1, num_examples=self.num_examples)
        )
        closing = self.federation.close_round(opened, outcome, RankReport.join(self.reports))
        self.store.commit()
        self.done = outcome["round"]
        return float(closing.state.server["params"]["x"][0])

    def die_after_sending(self, opening: Any) -> None:
        """Sends its update, and dies before it learns what became of the round."""

        def die(round: int) -> int:
            raise Died

        self.federation._wait_for_outcome = die  # type: ignore[method-assign]
        with contextlib.suppress(Died):
            self.send(opening)

    def round(self) -> float:
        return self.send(self.open())

    def die_before(self, message: str) -> None:
        """Dies where it would send a message of a secure sum."""
        post = self.federation._post

        def die(round: int, topic: str, tensors: Any, fields: Any) -> bool:
            if topic.endswith(message):
                raise Died
            return post(round, topic, tensors, fields)

        self.federation._post = die  # type: ignore[method-assign]

    @property
    def counted(self) -> int:
        return int((self.store.get(self.name) or {"counted": torch.tensor(0)})["counted"])

    def run(self) -> list[float]:
        """Takes part until the federation is over."""
        models = []
        while (opening := self.open()) is not None:
            models.append(self.send(opening))
        self.federation.leave("done")
        return models


def in_threads(*functions: Callable[[], Any]) -> list[Any]:
    """What each function returns, all at the same time."""
    results: list[Any] = [None] * len(functions)

    def run(index: int) -> None:
        try:
            results[index] = functions[index]()
        except BaseException as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive(), "a silo hangs"
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def without_launcher() -> None:
    """Lets a worker process be a launch of its own, as a silo is."""
    for name in list(os.environ):
        if name.startswith(("TORCHELASTIC_", "MASTER_")) or name.endswith(("RANK", "WORLD_SIZE")):
            del os.environ[name]
