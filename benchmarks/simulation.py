"""Rounds of simulation beside a plain PyTorch loop that does the same work, in one process.

W1: logistic regression, 1,000 clients of 60 examples, 100 a round, batches of 10.
W2: the FedAvg CNN, 100 clients of 300 examples, 10 a round, batches of 32.
W3: a 784-200-200-10 MLP, 100 clients of 600 examples, 10 a round, batches of 10.
FedAvg, one local epoch, SGD at 0.05. Printed is the median over the rounds of the time of a round divided by the time
of the plain loop's round that was run right beside it, and the largest difference of the final weights.

    python benchmarks/simulation.py --workload W1 --engine auto --threads 1
    torchrun --standalone --nproc-per-node=2 benchmarks/simulation.py --workload W1
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import statistics
import time
import warnings

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics.classification import MulticlassAccuracy

import lightning_fl as fl

WORKLOADS = {
    "W1": {"model": "logistic", "clients": 1000, "examples": 60, "per_round": 100, "batch": 10, "rounds": 20},
    "W2": {"model": "cnn", "clients": 100, "examples": 300, "per_round": 10, "batch": 32, "rounds": 5},
    "W3": {"model": "mlp", "clients": 100, "examples": 600, "per_round": 10, "batch": 10, "rounds": 10},
}
LR = 0.05


def make_network(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "logistic":
        return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    if kind == "mlp":
        hidden = [nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU()]
        return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(200, 10))
    first = [nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)]
    second = [nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(3136, 512), nn.ReLU(), nn.Linear(512, 10))


def make_data(work: dict) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(10, (work["clients"], work["examples"]), generator=generator)
    images = 0.3 * torch.randn(work["clients"], work["examples"], 1, 28, 28, generator=generator)
    patterns = 0.3 * torch.randn(10, 1, 28, 28, generator=generator)
    return (images + patterns[labels]).clamp(-0.5, 0.5), labels


class Module(L.LightningModule):
    """What a user writes; with ``logs``, it logs its loss and a torchmetric at each step."""

    def __init__(self, network: nn.Module, logs: bool) -> None:
        super().__init__()
        self.network = network
        self.logs = logs
        self.accuracy = MulticlassAccuracy(10, average="micro")

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        scores = self.network(images)
        loss = functional.cross_entropy(scores, labels)
        if self.logs:
            self.accuracy(scores, labels)
            self.log("loss", loss, on_step=False, on_epoch=True)
            self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=LR)


class PlainLoop:
    """The same rounds as a researcher would write them by hand, on one thread."""

    def __init__(self, work: dict, data: tuple[Tensor, Tensor]) -> None:
        self.work, (self.images, self.labels) = work, data
        self.network = make_network(work["model"])

    def round(self, cohort: list[int], dry: bool = False) -> None:
        params = list(self.network.parameters())
        start = [param.detach().clone() for param in params]
        total = [torch.zeros_like(param) for param in params]
        for client in cohort:
            with torch.no_grad():
                for param, value in zip(params, start, strict=True):
                    param.copy_(value)
            optimizer = torch.optim.SGD(params, lr=LR)
            size = self.work["batch"]
            batches = zip(self.images[client].split(size), self.labels[client].split(size), strict=True)
            for images, labels in batches:
                optimizer.zero_grad()
                functional.cross_entropy(self.network(images), labels).backward()
                optimizer.step()
            with torch.no_grad():
                for sums, param in zip(total, params, strict=True):
                    sums.add_(param)
        with torch.no_grad():
            for param, value, sums in zip(params, start, total, strict=True):
                param.copy_(value if dry else sums / len(cohort))


class Clock(L.Callback):
    """Times each round, and beside it a part of the same round by the plain loop."""

    def __init__(self, plain: PlainLoop, share: float) -> None:
        self.plain, self.share = plain, share
        self.cohorts: list[list[int]] = []
        self.seconds: list[float] = []
        self.plain_seconds: list[float] = []

    def on_round_start(self, trainer: L.Trainer, module: L.LightningModule, round: int, cohort: list[int]) -> None:
        self.cohorts.append(list(cohort))

    def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._started = time.perf_counter()

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.seconds.append(time.perf_counter() - self._started)
        self.plain_seconds.append(self._time_plain() if trainer.is_global_zero else math.nan)
        trainer.strategy.barrier()

    def _time_plain(self) -> float:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        part = self.cohorts[-1][: max(1, int(len(self.cohorts[-1]) * self.share))]
        start = time.perf_counter()
        self.plain.round(part, dry=True)
        seconds = (time.perf_counter() - start) * len(self.cohorts[-1]) / len(part)
        torch.set_num_threads(threads)
        return seconds


def run(args: argparse.Namespace) -> dict:
    work = WORKLOADS[args.workload]
    images, labels = make_data(work)
    size = work["batch"]
    loaders = fl.datamodules.ClientLoaders(
        range(work["clients"]),
        lambda client: list(zip(images[client].split(size), labels[client].split(size), strict=True)),
        num_examples=lambda client: work["examples"],
    )
    plain = PlainLoop(work, (images, labels))
    clock = Clock(plain, args.share)
    module = Module(make_network(work["model"]), args.logs)
    engine = args.engine
    if args.clients_per_step or args.compile:
        engine = fl.engines.Vectorized(clients_per_step=args.clients_per_step, compile=args.compile)
    strategy = fl.FederatedStrategy("fedavg", clients_per_round=work["per_round"], engine=engine, seed=0)
    trainer = L.Trainer(
        strategy=strategy,
        max_epochs=args.rounds or work["rounds"],
        callbacks=[clock],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loaders)
    ratios = sorted(own / plain for own, plain in zip(clock.seconds[1:], clock.plain_seconds[1:], strict=True))
    result = {
        "workload": args.workload,
        "engine": args.engine,
        "logs": args.logs,
        "ranks": strategy.federation.size,
        "threads": torch.get_num_threads(),
        "ratio": round(statistics.median(ratios), 3),
        "quartiles": [round(ratios[len(ratios) // 4], 3), round(ratios[-1 - len(ratios) // 4], 3)],
        "round_ms": round(1000 * statistics.median(clock.seconds[1:]), 1),
        "plain_ms": round(1000 * statistics.median(clock.plain_seconds[1:]), 1),
    }
    if args.check and trainer.is_global_zero:
        for cohort in clock.cohorts:
            plain.round(cohort)
        pairs = zip(plain.network.parameters(), module.network.parameters(), strict=True)
        result["largest_difference"] = max(float((a - b).abs().max()) for a, b in pairs)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=WORKLOADS, default="W1")
    parser.add_argument("--engine", choices=["auto", "sequential", "vectorized"], default="auto")
    parser.add_argument("--clients-per-step", type=int)
    parser.add_argument("--compile", action="store_true", help="compile the recorded step")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--share", type=float, default=1.0, help="part of the cohort that the plain loop is timed on")
    parser.add_argument("--logs", action="store_true", help="log the loss and a torchmetric at each step")
    parser.add_argument("--check", action="store_true", help="compare the final weights with the plain loop's")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(args.threads)
    result = run(args)
    if int(os.environ.get("RANK", 0)) == 0:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
