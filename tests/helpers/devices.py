"""A gateway without sockets, or in a thread, and what a device sends; none of it needs a training step that runs."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lightning_fl.aggregation import Aggregator, WeightedMean
from lightning_fl.algorithms import Algorithm, FedAvg
from lightning_fl.coordinator import wire
from lightning_fl.coordinator.audit import AuditLog
from lightning_fl.coordinator.disk import Disk
from lightning_fl.coordinator.store import Store
from lightning_fl.devices.admission import AdmissionRules
from lightning_fl.devices.gateway import Gateway, LocalPlan
from lightning_fl.devices.http_gateway import HttpGateway
from lightning_fl.devices.registry import Registry
from lightning_fl.federation import FederationSettings
from lightning_fl.schedules import Asynchronous, Buffered
from lightning_fl.tree import flatten
from tests.helpers.distributed import PATIENCE

NAMES = ("a", "b", "c")


def write_step(folder: Path, content: bytes = b"a graph") -> Path:
    """Something in the place of a training step, for a model of three zeros."""
    path = folder / "step.onnx"
    path.write_bytes(content)
    save_file({"x": torch.zeros(3)}, path.with_suffix(".safetensors"))
    return path


class Clock:
    """A wall clock that a test moves."""

    def __init__(self) -> None:
        self.now = 1e9

    def __call__(self) -> float:
        return self.now


def gateway(
    folder: Path,
    schedule: Asynchronous,
    *,
    step: Path | None = None,
    rounds: int = 10,
    rules: AdmissionRules | None = None,
    algorithm: Algorithm | None = None,
    aggregator: Aggregator | None = None,
    weighting: Any = "examples",
    disk: Disk | None = None,
    clock: Any = None,
    names: Sequence[str] = NAMES,
    **plan: Any,
) -> Gateway:
    settings = FederationSettings(
        *(algorithm or FedAvg(), aggregator or WeightedMean(), (), weighting), seed=0, population=1, schedule=schedule
    )
    registry = Registry(folder / "devices.json")
    for name in names:
        if name not in registry.names:
            (folder / f"{name}.token").write_text(registry.enrol(name))
    store = Store(folder / "federation", disk)
    own = LocalPlan(step or write_step(folder), **{"lr": 0.1, "batch_size": 10, **plan})
    try:
        audit = AuditLog(store.root / "audit.jsonl")
        return Gateway(settings, own, rounds, rules or AdmissionRules(), store, audit, registry, clock or Clock())
    except BaseException:
        store.close()
        raise


def check_in(own: Gateway, device: str, conditions: Sequence[str] = ()) -> dict[str, Any] | None:
    return own.check_in(device, {"protocol": 1, "conditions": list(conditions)})


def send(own: Gateway, device: str, task: dict[str, Any], delta: float | Tensor, **fields: Any) -> dict[str, Any]:
    """What the server does for a PUT."""
    tensor = delta if isinstance(delta, Tensor) else torch.full((3,), delta)
    path = own.arriving(device)
    said = {"version": task["version"], "num_examples": 1, "num_steps": 1, "loss": 0.5, **fields}
    wire.write(path, flatten({"delta": {"x": tensor}}), said)
    return own.receive(device, task["task"], path)


def model(own: Gateway) -> list[float]:
    return own.model.state.server["params"]["x"].tolist()


class LiveGateway:
    """Serves a gateway from a thread."""

    def __init__(self, own: Gateway, pages: Path | None = None) -> None:
        self.gateway, self.pages, self.error = own, pages, None
        self._started = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self._thread.start()
        assert self._started.wait(PATIENCE)

    async def _serve(self) -> None:
        self._loop, self._ended = asyncio.get_running_loop(), asyncio.Event()
        server = HttpGateway(self.gateway, self.pages)
        self.port = await server.start("127.0.0.1", 0)
        self._server = server
        self._started.set()
        await self._ended.wait()
        await server.stop()
        self.gateway.store.close()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def metrics(self) -> str:
        return self._server.metrics()

    def __enter__(self) -> LiveGateway:
        return self

    def __exit__(self, *error: object) -> None:
        self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()


BUFFERED = Buffered(size=3)
