"""How long rounds wait for the clients' data: read in the process, or by DataLoader workers, the next client's ahead.

Each of 10 clients has 200 examples that take 1 ms each to read, as from a file, and batches of 10 that take 10 ms to
train on. Printed are the seconds of the last round's training and of its waiting for data.

    python benchmarks/reading.py
"""

from __future__ import annotations

import json
import time
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from workloads import QUIET, prepare_process

import lightning_fl as fl


class Files(Dataset):
    """Examples that take a while to read."""

    def __len__(self) -> int:
        return 200

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        time.sleep(0.001)
        return torch.full((8,), index / 200), torch.tensor([index % 2.0])


class Module(L.LightningModule):
    """Takes a while for each step."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 1)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        time.sleep(0.01)
        return nn.functional.mse_loss(self.linear(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def measure(num_workers: int) -> dict[str, Any]:
    clients = fl.datamodules.ClientLoaders(
        range(10), lambda client: DataLoader(Files(), batch_size=10, shuffle=True, num_workers=num_workers)
    )
    strategy = fl.FederatedStrategy("fedavg", engine="sequential", seed=0)
    L.Trainer(strategy=strategy, max_epochs=3, **QUIET).fit(Module(), clients)
    seconds = strategy.history[-1]["seconds"]
    return {"num_workers": num_workers, "train": round(seconds["train"], 2), "read": round(seconds["read"], 2)}


if __name__ == "__main__":
    prepare_process()
    for num_workers in (0, 1, 2):
        print(json.dumps(measure(num_workers)))
