"""The vectorized engine by itself, without a Trainer, beside a plain PyTorch loop over the same clients.

A round of a workload of simulation.py: the clients are loaded, their batches stacked, the steps run (forward, backward,
step of SGD), and their updates summed. Printed are the medians of rounds that take turns with those of the plain loop:
their ratio to it, and the milliseconds of each stage; of CPU time, on one thread.

    python benchmarks/vectorized_step.py --workload W1 W3

``engine`` is the vectorized engine, all clients of a round in one group. For W1 and W3, ``bmm`` is the same round by
hand: batched matrix products and derived gradients, without autograd, stacking or the user's optimizer.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from simulation import PlainLoop
from torch import Tensor
from torch.nn import functional
from workloads import WORKLOADS, Workload, batches_of, make_data, make_network, prepare_process

from lightning_fl.engines import VectorizedEngine
from lightning_fl.engines.optimizer_states import OptimizerStates
from lightning_fl.engines.vectorized.stacking import stack
from lightning_fl.engines.vectorized.step_schedule import are_equal, step_masks


class EngineLoop:
    """Rounds by :class:`VectorizedEngine`, all clients of a cohort as one group."""

    def __init__(self, work: Workload, data: tuple[Tensor, Tensor]) -> None:
        self.work, self.data = work, data
        self.network = make_network(work)
        self.optimizer = torch.optim.SGD(self.network.parameters(), lr=work.lr)
        self.engine = VectorizedEngine(self.network, OptimizerStates([self.optimizer]))
        self.rounds: list[dict[str, float]] = []

    def round(self, cohort: list[int]) -> list[Tensor]:
        """The mean of the trained parameters, each client weighted by its examples."""
        engine, stage = self.engine, self._stage
        self.rounds.append(defaultdict(float))
        with stage("load clients"):
            start = engine.begin_round(None)
            engine.start([start] * len(cohort), [{}] * len(cohort))
        batches = [batches_of(client, self.data, self.work) for client in cohort]
        works = [[len(labels) for _, labels in own] for own in batches]
        num_steps = [len(work) for work in works]
        is_equal = are_equal(works)
        masks = [tuple(range(len(cohort)))] * num_steps[0] if is_equal else step_masks(works)
        unread = [iter(own) for own in batches]
        for mask in masks:
            with stage("stack batches"):
                batch, _ = stack([next(unread[row]) for row in mask], share=False, pool=engine.pool)
            with stage("choose clients"):
                engine.choose(mask)
            with stage("forward"):
                loss = self._loss(batch)
            with stage("backward"):
                self.optimizer.zero_grad()
                loss.backward()
            with stage("optimizer"):
                self.optimizer.step()
        with stage("finish"):
            result = engine.finish(None if is_equal else num_steps)
            weights = torch.tensor([float(self.work.sizes[client]) for client in cohort])
            weights /= weights.sum()
            means = [start[n] + torch.tensordot(weights, own - start[n], 1) for n, own in result.params.items()]
            engine.end_round(start, {}, None)
        return means

    def _loss(self, batch: Any) -> Tensor:
        def step(batch: Any) -> tuple[Tensor, list[Tensor]]:
            inputs, labels = batch
            return functional.cross_entropy(self.network(inputs), labels), []

        return self.engine.forward_stacked(step, batch)[0].sum()

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        started = time.process_time()
        yield
        self.rounds[-1][name] += time.process_time() - started


class BmmLoop:
    """Rounds of a chain of linear layers with ReLU between them, as batched matrix products written by hand."""

    def __init__(self, work: Workload, data: tuple[Tensor, Tensor]) -> None:
        self.work, self.data = work, data
        self.layers = [m for m in make_network(work).modules() if isinstance(m, torch.nn.Linear)]

    @torch.no_grad()
    def round(self, cohort: list[int]) -> list[Tensor]:
        """The mean of the trained parameters."""
        size, lr = len(cohort), self.work.lr
        weights = [m.weight.expand(size, -1, -1).clone() for m in self.layers]
        biases = [m.bias.expand(size, 1, -1).clone() for m in self.layers]
        images, labels = (tensor[cohort].flatten(2) for tensor in (self.data[0], self.data[1].unsqueeze(-1)))
        for start in range(0, self.work.examples, self.work.batch):
            rows = slice(start, start + self.work.batch)
            inputs = [images[:, rows]]
            for weight, bias in zip(weights[:-1], biases[:-1], strict=True):
                inputs.append(torch.baddbmm(bias, inputs[-1], weight.mT).relu_())
            grad = torch.baddbmm(biases[-1], inputs[-1], weights[-1].mT).softmax(-1)
            grad.scatter_add_(-1, labels[:, rows], grad.new_full((), -1).expand(size, self.work.batch, 1))
            grad /= self.work.batch
            for index in reversed(range(len(weights))):
                below = torch.bmm(grad, weights[index]).mul_(inputs[index] > 0) if index else grad
                weights[index].baddbmm_(grad.mT, inputs[index], alpha=-lr)
                biases[index].sub_(grad.sum(1, keepdim=True), alpha=lr)
                grad = below
        return [own.mean(0) for pair in zip(weights, biases, strict=True) for own in pair]


def measure(work: Workload, repeats: int) -> dict[str, Any]:
    data = make_data(work)
    plain, engine = PlainLoop(work, data), EngineLoop(work, data)
    loops: dict[str, Callable[[list[int]], Any]] = {
        "plain": lambda cohort: plain.round(cohort, dry=True),
        "engine": engine.round,
    }
    if work in (WORKLOADS["W1"], WORKLOADS["W3"]):
        loops["bmm"] = BmmLoop(work, data).round
    generator = torch.Generator().manual_seed(0)
    seconds: dict[str, list[float]] = defaultdict(list)
    for _ in range(repeats + 1):
        cohort = torch.randperm(work.clients, generator=generator)[: work.per_round].tolist()
        for name, run in loops.items():
            started = time.process_time()
            run(cohort)
            seconds[name].append(time.process_time() - started)
    timed = {name: own[1:] for name, own in seconds.items()}
    ratios = {name: [a / b for a, b in zip(own, timed["plain"], strict=True)] for name, own in timed.items()}
    stages = {name: [own[name] for own in engine.rounds[1:]] for name in engine.rounds[0]}
    plain.round(cohort)
    means = [own for name, run in loops.items() if name != "plain" for own in run(cohort)]
    expected = [*plain.network.parameters()] * (len(loops) - 1)
    return {
        "ratio": {name: round(statistics.median(own), 3) for name, own in ratios.items()},
        "ms": {name: round(1000 * statistics.median(own), 1) for name, own in timed.items()},
        "stages_ms": {name: round(1000 * statistics.median(own), 2) for name, own in stages.items()},
        "largest_difference": max(float((a - b).detach().abs().max()) for a, b in zip(means, expected, strict=True)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=WORKLOADS, nargs="+", default=["W1", "W1-unequal", "W3"])
    parser.add_argument("--repeats", type=int, default=10, help="rounds that are timed, after one that is not")
    args = parser.parse_args()
    prepare_process()
    for name in args.workload:
        print(json.dumps({"workload": name, **measure(WORKLOADS[name], args.repeats)}), flush=True)


if __name__ == "__main__":
    main()
