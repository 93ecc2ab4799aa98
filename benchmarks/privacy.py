"""What sample-level privacy costs beside Opacus in a plain loop over the same batches.

    python benchmarks/privacy.py

Both train with the same draws, clip norm and noise multiplier; the Trainer's side draws them again, takes its noise
from the cipher and checks itself in every round. Prints the seconds of a step and the median ratio of runs side by
side.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import lightning as L
import numpy as np
import torch
from opacus.grad_sample import GradSampleHooks
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset
from workloads import QUIET

import lightning_fl as fl
from lightning_fl.privacy.sample_level.poisson_loader import PoissonBatches
from lightning_fl.seeding import derive_seed

SEED, CLIP, NOISE, LR = 0, 1.0, 1.0, 0.05


def two_layers() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 10)
    )


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 8, 2, padding=3),
        nn.ReLU(),
        nn.MaxPool2d(2, 1),
        nn.Conv2d(16, 32, 4, 2),
        nn.ReLU(),
        nn.MaxPool2d(2, 1),
        nn.Flatten(),
        nn.Linear(512, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    )


class Classifier(L.LightningModule):
    """A network that classifies."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return functional.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), LR)


def by_opacus(network: nn.Module, data: TensorDataset, batch_size: int, rounds: int) -> float:
    """Opacus in a plain loop; the seconds of all steps."""
    rate, num_batches = batch_size / len(data), -(-len(data) // batch_size)
    draws = [
        batch
        for round in range(rounds)
        for batch in PoissonBatches(
            len(data), rate, num_batches, np.random.default_rng(derive_seed(SEED, round, "batches", 0))
        )
    ]
    hooks = GradSampleHooks(network)
    optimizer = DPOptimizer(
        torch.optim.SGD(network.parameters(), LR),
        noise_multiplier=NOISE,
        max_grad_norm=CLIP,
        expected_batch_size=batch_size,
    )
    loader = DataLoader(data, batch_sampler=draws)
    start = time.perf_counter()
    for x, y in loader:
        optimizer.zero_grad()
        functional.cross_entropy(network(x), y).backward()
        optimizer.step()
    seconds = time.perf_counter() - start
    hooks.cleanup()
    return seconds


class Stopwatch(L.Callback):
    """The seconds from the first round to the last."""

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.current_epoch:
            self.start = time.perf_counter()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seconds = time.perf_counter() - self.start


def by_trainer(network: nn.Module, data: TensorDataset, batch_size: int, rounds: int) -> float:
    """The callback in a Trainer with one client; the seconds of all rounds."""
    watch = Stopwatch()
    private = fl.callbacks.SampleLevelDP(
        noise_multiplier=NOISE, max_grad_norm=CLIP, insecure_test_seed=SEED, method="rdp"
    )
    trainer = L.Trainer(
        strategy=fl.FederatedStrategy(num_clients=1),
        max_epochs=rounds,
        callbacks=[private, watch],
        **QUIET,
    )
    trainer.fit(Classifier(network), DataLoader(data, batch_size, shuffle=True))
    return watch.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=6000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    data = TensorDataset(torch.rand(args.examples, 1, 28, 28), torch.randint(10, (args.examples,)))
    settings: list[tuple[str, Callable[[], nn.Module], int]] = [
        ("two layers, batches of 64", two_layers, 64),
        ("two layers, batches of 256", two_layers, 256),
        ("convolutions, batches of 64", convolutions, 64),
        ("convolutions, batches of 256", convolutions, 256),
    ]
    print(f"{'model':32}{'Opacus ms/step':>16}{'Trainer ms/step':>17}{'ratio':>8}")
    for name, make, batch_size in settings:
        steps = args.rounds * -(-args.examples // batch_size)
        pairs = []
        for _ in range(args.repeats):
            pairs.append([run(make(), data, batch_size, args.rounds) for run in (by_opacus, by_trainer)])
        theirs, ours = (1e3 * statistics.median(column) / steps for column in zip(*pairs, strict=True))
        ratio = statistics.median(own / other for other, own in pairs)
        print(f"{name:32}{theirs:16.1f}{ours:17.1f}{ratio:8.2f}", flush=True)


if __name__ == "__main__":
    main()
