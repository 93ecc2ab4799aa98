"""Rounds of simulation beside a plain PyTorch loop that does the same work, in one process.

W1: logistic regression, 1,000 clients of 60 examples, 100 a round, batches of 10.
W1-unequal: the same with 300 clients of 3 to 200 examples, half of them with 40 or fewer.
W2: the FedAvg CNN, 100 clients of 300 examples, 10 a round, batches of 32.
W3: a 784-200-200-10 MLP, 100 clients of 600 examples, 10 a round, batches of 10.
LSTM: two layers of 128 units on 40 characters of 80, 100 clients of 24 sequences, 20 a round, batches of 8.
CIFAR: convolutions of 32 and 64 channels on 3x32x32, 1,000 clients of 50 examples, 50 a round, batches of 10.
transformer: two causal layers of width 64 without dropout, on the data of the LSTM.
FedAvg, one local epoch, SGD at 0.05. Printed is the median over the rounds but the first of the time of a round, its
plan and its reduction included, divided by the time of the plain loop's round that was run right beside it. With
several ranks the figures are those of rank 0.

    python benchmarks/simulation.py --workload W1 --engine auto --threads 1
    torchrun --standalone --nproc-per-node=2 benchmarks/simulation.py --workload W1
    python benchmarks/simulation.py --workload W1 --device cuda

With ``--device cuda`` data, plain loop and ours are on the GPU; `benchmarks/gpu.py` does all workloads there.
``--check`` adds the largest difference of the final weights, and fails if it is above 1e-5. ``--stages`` adds where the
time of a round goes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import statistics
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import lightning as L
import torch
from stages import Stages
from torch import Tensor
from torch.nn import functional
from workloads import QUIET, WORKLOADS, Module, Workload, batches_of, make_data, make_network, prepare_process

import lightning_fl as fl

TOLERANCE = 1e-5


class PlainLoop:
    """The same rounds as a researcher would write them by hand, on one thread."""

    def __init__(self, work: Workload, data: tuple[Tensor, Tensor]) -> None:
        self.work, self.data = work, data
        self.network = make_network(work).to(data[0].device)

    def round(self, cohort: list[int], dry: bool = False) -> None:
        params = list(self.network.parameters())
        start = [param.detach().clone() for param in params]
        total = [torch.zeros_like(param) for param in params]
        sizes = self.work.sizes
        for client in cohort:
            with torch.no_grad():
                for param, value in zip(params, start, strict=True):
                    param.copy_(value)
            optimizer = torch.optim.SGD(params, lr=self.work.lr)
            for inputs, labels in batches_of(client, self.data, self.work):
                optimizer.zero_grad()
                functional.cross_entropy(self.network(inputs), labels).backward()
                optimizer.step()
            with torch.no_grad():
                for sums, param in zip(total, params, strict=True):
                    sums.add_(param, alpha=sizes[client])
        weight = sum(sizes[client] for client in cohort)
        with torch.no_grad():
            for param, value, sums in zip(params, start, total, strict=True):
                param.copy_(value if dry else sums / weight)


class Clock(L.Callback):
    """Times each round, and beside it a part of the same round by the plain loop."""

    def __init__(self, plain: PlainLoop, share: float = 1.0) -> None:
        self.plain, self.share = plain, share
        self.stages = Stages()
        self.cohorts: list[list[int]] = []
        self.seconds: list[float] = []
        self.plain_seconds: list[float] = []

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._start()

    def on_round_start(self, trainer: L.Trainer, module: L.LightningModule, round: int, cohort: list[int]) -> None:
        self.cohorts.append(list(cohort))

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._synchronize()
        self.seconds.append(time.perf_counter() - self._started)
        self.stages.end_round()
        trainer.strategy.barrier()  # no rank works beside the plain loop
        self.plain_seconds.append(self._time_plain() if trainer.is_global_zero else math.nan)
        trainer.strategy.barrier()
        self._start()

    def _start(self) -> None:
        self._started = time.perf_counter()
        self.stages.begin_round()

    def _synchronize(self) -> None:
        """Waits for what the GPU still has to do."""
        if self.plain.data[0].is_cuda:
            torch.cuda.synchronize()

    def _time_plain(self) -> float:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        part = self.cohorts[-1][: max(1, int(len(self.cohorts[-1]) * self.share))]
        start = time.perf_counter()
        self.plain.round(part, dry=True)
        self._synchronize()
        seconds = (time.perf_counter() - start) * len(self.cohorts[-1]) / len(part)
        torch.set_num_threads(threads)
        return seconds


def client_loaders(work: Workload, data: tuple[Tensor, Tensor]) -> fl.datamodules.ClientLoaders:
    return fl.datamodules.ClientLoaders(
        range(work.clients),
        lambda client: batches_of(client, data, work),
        num_examples=lambda client: work.sizes[client],
    )


def fit(
    module: Module,
    work: Workload,
    data: tuple[Tensor, Tensor],
    rounds: int,
    engine: str | fl.engines.Vectorized = "auto",
    callbacks: tuple[L.Callback, ...] = (),
) -> fl.FederatedStrategy:
    strategy = fl.FederatedStrategy("fedavg", clients_per_round=work.per_round, engine=engine, seed=0)
    settings = QUIET | {"accelerator": "gpu" if data[0].is_cuda else "cpu"}
    trainer = L.Trainer(strategy=strategy, max_epochs=rounds, callbacks=list(callbacks), **settings)
    trainer.fit(module, client_loaders(work, data))
    return strategy


def largest_difference(module: Module, plain: PlainLoop, cohorts: list[list[int]]) -> float:
    """Of a weight, once the plain loop has trained the same cohorts."""
    for cohort in cohorts:
        plain.round(cohort)
    pairs = zip(plain.network.parameters(), module.network.parameters(), strict=True)
    differences = torch.stack([(theirs.cpu() - own.cpu()).detach().abs().max() for theirs, own in pairs])
    return float(differences.max())  # NaN if there is one


def peak_bytes(device: str = "cpu") -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def run(args: argparse.Namespace, callbacks: tuple[L.Callback, ...] = ()) -> dict[str, Any]:
    work = WORKLOADS[args.workload]
    work = replace(work, rounds=args.rounds or work.rounds, per_round=args.per_round or work.per_round)
    inputs, labels = make_data(work)
    data = inputs.to(args.device), labels.to(args.device)
    if args.double:
        torch.set_default_dtype(torch.float64)  # of the networks that are made below
        data = (data[0].double() if data[0].is_floating_point() else data[0]), data[1]
    clock = Clock(PlainLoop(work, data), args.share)
    module = Module(work, args.logs)
    engine = args.engine
    if args.clients_per_step or args.capture:
        engine = fl.engines.Vectorized(clients_per_step=args.clients_per_step, capture_steps=args.capture)
    before = peak_bytes(args.device)
    with clock.stages.measured() if args.stages else nullcontext():
        strategy = fit(module, work, data, work.rounds, engine, (clock, *callbacks))
    growth = peak_bytes(args.device) - before
    ratios = sorted(own / plain for own, plain in zip(clock.seconds[1:], clock.plain_seconds[1:], strict=True))
    result = {
        "workload": args.workload,
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "engine": args.engine,
        "logs": args.logs,
        "ranks": strategy.federation.size,
        "threads": torch.get_num_threads(),
        "per_round": work.per_round,
        "rounds": work.rounds,
        "ratio": round(statistics.median(ratios), 3),
        "quartiles": [round(ratios[len(ratios) // 4], 3), round(ratios[-1 - len(ratios) // 4], 3)],
        "first_round_ms": round(1000 * clock.seconds[0], 1),
        "round_ms": round(1000 * statistics.median(clock.seconds[1:]), 1),
        "plain_ms": round(1000 * statistics.median(clock.plain_seconds[1:]), 1),
        "communicate_ms": round(1000 * statistics.median(e["seconds"]["communicate"] for e in strategy.history[1:]), 2),
        "peak_growth_mb": round(growth / 1e6, 1),
    }
    if args.stages:
        result["stages_ms"] = {name: round(1000 * seconds, 2) for name, seconds in clock.stages.medians().items()}
    if args.capture:
        vectorized = strategy.active_driver.vectorized
        replays = None if vectorized is None else vectorized.engine.replays
        result["replayed_steps"] = 0 if replays is None else replays.num_replays
        result["launches"] = 0 if replays is None else replays.num_launches
    if args.check and strategy.is_global_zero:
        result["largest_difference"] = largest_difference(module, clock.plain, clock.cohorts)
    return result


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=WORKLOADS, default="W1")
    parser.add_argument("--engine", choices=["auto", "sequential", "vectorized"], default="auto")
    parser.add_argument("--clients-per-step", type=int, help="asks for the vectorized engine")
    parser.add_argument("--capture", action="store_true", help="replay captured steps; asks for the vectorized engine")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--double", action="store_true", help="compute in float64")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, help="at least 2: the first is not counted")
    parser.add_argument("--per-round", type=int, help="clients a round")
    parser.add_argument("--share", type=float, default=1.0, help="part of the cohort that the plain loop is timed on")
    parser.add_argument("--logs", action="store_true", help="log the loss and a torchmetric at each step")
    parser.add_argument("--stages", action="store_true", help="tell where the time of a round goes")
    parser.add_argument("--check", action="store_true", help="compare the final weights with the plain loop's")
    return parser


def main() -> None:
    parser = make_parser()
    args = parser.parse_args()
    if args.rounds is not None and args.rounds < 2:
        parser.error(f"--rounds {args.rounds}: expected at least 2, because the first is not counted.")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here.")
    if args.engine == "sequential" and (args.clients_per_step or args.capture):
        parser.error("--clients-per-step and --capture are for the vectorized engine; leave out --engine sequential.")
    prepare_process(args.threads)
    result = run(args)
    if int(os.environ.get("RANK", 0)) == 0:
        print(json.dumps(result))
        difference = result.get("largest_difference", 0.0)
        if not difference <= TOLERANCE:
            sys.exit(f"The final weights differ from the plain loop's by up to {difference}, more than {TOLERANCE}.")


if __name__ == "__main__":
    main()
