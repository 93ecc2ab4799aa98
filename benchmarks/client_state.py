"""SCAFFOLD with many clients whose states do not fit in memory: ``python benchmarks/client_state.py``.

10,000 clients, 100 in a round, a model of 1 million parameters; goes on until 2,000 distinct clients have taken part,
then resumes from the checkpoint for one more round. Prints the peak memory of the process.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import tempfile
import time

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from workloads import prepare_process

import lightning_fl as fl


class Net(L.LightningModule):
    """A linear layer with about a million parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1000, 1000)

    def training_step(self, batch: tuple[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return self.layer(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def clients(num_clients: int) -> fl.datamodules.ClientLoaders:
    def make(client: int) -> DataLoader:
        x = torch.randn(4, 1000, generator=torch.Generator().manual_seed(client))
        return DataLoader(TensorDataset(x), batch_size=4)

    return fl.datamodules.ClientLoaders(range(num_clients), make, num_examples=lambda client: 4)


def fit(rounds: int, num_clients: int, ckpt_path: str | None = None) -> fl.FederatedStrategy:
    strategy = fl.FederatedStrategy("scaffold", clients_per_round=100, seed=0)
    L.Trainer(
        strategy=strategy,
        max_epochs=rounds,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ModelCheckpoint(".", filename="last", every_n_epochs=rounds)],
    ).fit(Net(), clients(num_clients), ckpt_path=ckpt_path, weights_only=True)
    return strategy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=23)
    parser.add_argument("--clients", type=int, default=10_000)
    arguments = parser.parse_args()
    prepare_process()
    with tempfile.TemporaryDirectory(dir=os.getcwd()) as folder:
        os.chdir(folder)
        start = time.perf_counter()
        strategy = fit(arguments.rounds, arguments.clients)
        seconds = time.perf_counter() - start
        distinct = len(strategy.active_driver.store)
        del strategy  # one process trains, another resumes
        gc.collect()
        resumed = fit(arguments.rounds + 1, arguments.clients, "last.ckpt")
        print(
            json.dumps(
                {
                    "distinct_clients": distinct,
                    "state_gigabytes": distinct * 1_001_000 * 4 / 1e9,
                    "peak_memory_gigabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
                    "seconds": seconds,
                    "rounds_after_resume": len(resumed.history),
                }
            )
        )
        os.chdir("..")


if __name__ == "__main__":
    main()
