"""What a federation costs over the work itself: ``python benchmarks/overhead.py``.

Each figure is a ratio against something run beside it in the same process, because machines are noisy:

- ``fit``: one client, against a plain Trainer, for steps of about 5 ms;
- ``memory``: growth of the process with 10 to 10,000 clients of the same total size, by engine;
- ``round``: a round without training on a 25 MB and a 100 MB model on two ranks, against Gloo's own all-reduce.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

import lightning as L
import psutil
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from workloads import QUIET, prepare_process

import lightning_fl as fl


class Net(L.LightningModule):
    """A linear layer of a chosen size; its step does nothing but keep time if ``milliseconds`` is given."""

    def __init__(self, width: int, milliseconds: float = 0.0, lr: float = 0.01) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width)
        self.milliseconds = milliseconds
        self.lr = lr

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        end = time.perf_counter() + self.milliseconds / 1000
        while time.perf_counter() < end:
            pass
        return self.layer(batch[0]).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def data(num_examples: int, width: int) -> TensorDataset:
    return TensorDataset(torch.randn(num_examples, width))


def seconds_of_fit(strategy: Any, loader: Any, epochs: int) -> float:
    trainer = L.Trainer(strategy=strategy, max_epochs=epochs, **QUIET)
    start = time.perf_counter()
    trainer.fit(Net(16, milliseconds=5.0), loader)
    return time.perf_counter() - start


def measure_fit(repeats: int = 5) -> dict[str, Any]:
    loader = DataLoader(data(200, 16), batch_size=4)
    ratios = [
        seconds_of_fit("fedavg", fl.datamodules.ClientLoaders([loader]), 4) / seconds_of_fit("auto", loader, 4)
        for _ in range(repeats)
    ]
    return {"what": "fit, one client, 5 ms a step, over a plain Trainer", "ratio": statistics.median(ratios)}


def measure_memory(num_clients: int, engine: str) -> None:
    """Prints the memory that training that many clients adds to the process; in a process of its own."""
    rows = torch.randn(10_000, 64)
    size = len(rows) // num_clients
    clients = fl.datamodules.ClientLoaders(
        range(num_clients),
        lambda client: DataLoader(TensorDataset(rows[client * size : (client + 1) * size]), batch_size=1000),
        num_examples=lambda client: size,
    )
    process = psutil.Process()
    before = process.memory_info().rss
    L.Trainer(strategy=fl.FederatedStrategy("fedavg", engine=engine), max_epochs=2, **QUIET).fit(Net(64), clients)
    megabytes = (process.memory_info().rss - before) / 1e6
    print(json.dumps({"num_clients": num_clients, "engine": engine, "megabytes": megabytes}))


def measure_round(megabytes: int, rounds: int = 8) -> None:
    """Prints the time of a round without training over Gloo's own all-reduce; run by torchrun."""
    width = int((megabytes * 1e6 / 4) ** 0.5)
    strategy = fl.FederatedStrategy("fedavg", timeout=120.0)
    trainer = L.Trainer(strategy=strategy, max_epochs=rounds, **QUIET)
    rank = int(os.environ["RANK"])
    loader = DataLoader(data(1, width), batch_size=1)
    trainer.fit(Net(width, lr=0.0), loader)
    group, flat = strategy.federation, torch.zeros(width * width + width)
    raw = []
    for _ in range(rounds):
        group.barrier()
        start = time.perf_counter()
        group.all_reduce(flat)
        raw.append(time.perf_counter() - start)
    reducing = statistics.median(entry["seconds"]["communicate"] for entry in strategy.history[1:])
    closing = statistics.median(
        entry["seconds"]["communicate"] + entry["seconds"]["server"] for entry in strategy.history[1:]
    )
    if rank == 0:
        raw_seconds = statistics.median(raw)
        print(
            json.dumps(
                {
                    "what": f"{megabytes} MB model, 2 ranks",
                    "all_reduce_of_the_round_over_raw": reducing / raw_seconds,
                    "all_reduce_and_server_step_over_raw": closing / raw_seconds,
                    "raw_seconds": raw_seconds,
                }
            )
        )


def run(*command: str) -> None:
    result = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=300, check=True)
    print("".join(line + "\n" for line in result.stdout.splitlines() if line.startswith("{")), end="", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--memory", type=int, default=0)
    parser.add_argument("--engine", default="sequential")
    parser.add_argument("--round", type=int, default=0)
    arguments = parser.parse_args()
    prepare_process()
    if arguments.memory:
        measure_memory(arguments.memory, arguments.engine)
    elif arguments.round:
        measure_round(arguments.round)
    else:
        print(json.dumps(measure_fit()), flush=True)
        for engine in ("sequential", "vectorized"):
            for num_clients in (10, 100, 1_000, 10_000):
                run(__file__, "--memory", str(num_clients), "--engine", engine)
        for megabytes in (25, 100):
            run("-m", "torch.distributed.run", "--nproc-per-node", "2", __file__, "--round", str(megabytes))


if __name__ == "__main__":
    main()
