"""A thousand simulated devices against a gateway: updates a second, how long devices wait for answers, memory.

The gateway is a process of its own, the devices are coroutines of this one. A device checks in, loads the model, trains
for no time at all, and sends an update whose values are all 1: so the model is the number of rounds in the end, unless
an update was lost or counted twice.

    python benchmarks/devices.py --devices 1000 --updates 3000
"""

from __future__ import annotations

import argparse
import asyncio
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import aiohttp
import numpy as np
import torch
from safetensors.torch import save_file

from lightning_fl.coordinator.export import read_model
from lightning_fl.devices.registry import Registry

sys.path.insert(0, str(Path(__file__).parents[1] / "devices" / "python"))
from lightning_fl_device import DELTA, encode

CONFIG = """\
strategy: fedavg
schedule: {{class_path: Buffered, init_args: {{size: {size}}}}}
step: step.onnx
folder: federation
rounds: {rounds}
lr: 0.1
batch_size: 16
max_examples: 1
port: {port}
admin_port: null
"""


class Times:
    """Seconds of each kind of call."""

    def __init__(self) -> None:
        self.calls: dict[str, list[float]] = {"check-in": [], "model": [], "update": []}

    def show(self) -> None:
        for name, found in self.calls.items():
            middle, most = np.percentile(found, [50, 99]) * 1000
            print(f"{name:9} {len(found):6} calls, median {middle:7.1f} ms, 99% {most:8.1f} ms")


async def device(session: aiohttp.ClientSession, address: str, token: str, size: int, times: Times) -> int:
    """Trains until the federation is over; returns how many updates were taken."""
    headers, taken = {"Authorization": f"Bearer {token}"}, 0
    delta = {DELTA + "x": np.ones(size, np.float32)}
    while True:
        start = time.perf_counter()
        async with session.post(f"{address}/v1/checkin", json={"protocol": 1}, headers=headers) as answer:
            if answer.status == 410:
                return taken
            if answer.status == 204:  # held: no task yet
                continue
            task = await answer.json()
        times.calls["check-in"].append(time.perf_counter() - start)
        start = time.perf_counter()
        async with session.get(f"{address}/v1/models/{task['version']}", headers=headers) as answer:
            if answer.status == 410:  # rounds have closed meanwhile
                continue
            await answer.read()
        times.calls["model"].append(time.perf_counter() - start)
        body = encode(delta, {"version": task["version"], "num_examples": 1, "num_steps": 1, "loss": 1.0})
        start = time.perf_counter()
        url = f"{address}/v1/updates?task={task['task']}"
        async with session.put(url, data=body, headers=headers) as answer:
            taken += answer.status == 200
        times.calls["update"].append(time.perf_counter() - start)


async def drive(address: str, tokens: list[str], size: int, times: Times) -> list[int]:
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=600)) as session:
        return await asyncio.gather(*(device(session, address, token, size, times) for token in tokens))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=1000)
    parser.add_argument("--updates", type=int, default=3000, help="all together")
    parser.add_argument("--size", type=int, default=100, help="updates of a round")
    parser.add_argument("--parameters", type=int, default=10_000)
    args = parser.parse_args()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 4 * args.devices)), hard))
    with tempfile.TemporaryDirectory() as name, socket.socket() as found:
        folder = Path(name)
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
        found.close()
        rounds = args.updates // args.size
        (folder / "step.onnx").write_bytes(b"nobody runs it")
        save_file({"x": torch.zeros(args.parameters)}, folder / "step.safetensors")
        (folder / "gateway.yaml").write_text(CONFIG.format(size=args.size, rounds=rounds, port=port), encoding="utf-8")
        registry = Registry(folder / "federation" / "devices.json")
        tokens = [registry.enrol(f"device-{index}") for index in range(args.devices)]
        command = [sys.executable, "-m", "lightning_fl", "gateway", "--config", str(folder / "gateway.yaml")]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert server.stdout is not None
        server.stdout.readline()
        times, start = Times(), time.perf_counter()
        try:
            taken = asyncio.run(drive(f"http://127.0.0.1:{port}", tokens, args.parameters, times))
            seconds = time.perf_counter() - start
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait()
        memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        model = read_model(folder / "federation")[0]["x"]
        assert torch.equal(model, torch.full_like(model, rounds)), "an update was lost or counted twice"
    print(f"{args.devices} devices, {args.parameters} parameters, {rounds} rounds of {args.size} updates")
    print(f"{sum(taken)} updates in {seconds:.1f} s: {sum(taken) / seconds:.0f} a second; gateway {memory:.0f} MB")
    times.show()


if __name__ == "__main__":
    main()
