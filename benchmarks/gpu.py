"""Every workload of benchmarks/simulation.py on a GPU: rounds, their first, how busy the GPU is, and memory.

    python benchmarks/gpu.py
    torchrun --standalone --nproc-per-node=2 benchmarks/gpu.py

One line a workload and engine, as a Markdown table: milliseconds of a round beside those of the plain loop on the same
GPU, of the first round, the share of a round's time in which a kernel ran, the peak of the GPU's memory, how many steps
were replays of CUDA graphs, and in how many launches. `captured` is the vectorized engine with `capture_steps=True`, an
empty line where it can't train a workload, and `captured alone` the same for clients one after the other; `pfl` are the
rounds of pfl-research, where it is installed (`pip install pfl`). It fails if the final weights differ from the plain
loop's by more than 1e-5; those of W2 and CIFAR, where a rounding grows within a round, are compared in float64.
``--workloads W1 W3`` measures some, and ``--device cpu --rounds 2 --per-round 4`` tries the script where no GPU is.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import replace
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from pfl_rounds import pfl_round_ms
from simulation import TOLERANCE, make_parser, run
from torch.profiler import ProfilerActivity, profile
from workloads import WORKLOADS, make_data, prepare_process

ENGINES = ("auto", "captured", "sequential", "captured alone")
COLUMNS = (
    "workload",
    "engine",
    "round_ms",
    "plain_ms",
    "first_round_ms",
    "busy",
    "peak_growth_mb",
    "replayed_steps",
    "launches",
    "largest_difference",
)
CHAOTIC = ("W2", "CIFAR")


class Busy(L.Callback):
    """The share of one round's time in which the GPU computes; that round, the last, is slowed by the profiler."""

    share = 0.0

    def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert trainer.max_epochs is not None
        if trainer.current_epoch == trainer.max_epochs - 1 and torch.cuda.is_available():
            self._profile = profile(activities=[ProfilerActivity.CUDA])
            self._profile.__enter__()
            self._started = time.perf_counter()

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert trainer.max_epochs is not None
        if trainer.current_epoch == trainer.max_epochs - 1 and torch.cuda.is_available():
            torch.cuda.synchronize()
            seconds = time.perf_counter() - self._started
            self._profile.__exit__(None, None, None)
            microseconds = sum(event.self_device_time_total for event in self._profile.key_averages())
            self.share = microseconds / 1e6 / seconds


def measure(workload: str, engine: str, options: argparse.Namespace) -> dict[str, Any]:
    """The figures of one workload."""
    is_chaotic, is_captured = workload in CHAOTIC, engine.startswith("captured")
    own = {**vars(options), "workload": workload, "engine": "auto" if is_captured else engine, "capture": is_captured}
    if engine == "captured alone":
        own["clients_per_step"] = 1
    busy = Busy()
    result = run(argparse.Namespace(**{**own, "check": not is_chaotic}), (busy,))
    if is_chaotic:
        before = torch.get_default_dtype()
        exact = run(argparse.Namespace(**{**own, "rounds": 2, "check": True, "double": True}))
        torch.set_default_dtype(before)
        result["largest_difference"] = exact.get("largest_difference")
    return {"replayed_steps": "", "launches": "", **result, "engine": engine, "busy": f"{busy.share:.0%}"}


def measure_pfl(workload: str, options: argparse.Namespace) -> dict[str, Any] | None:
    """The figures of pfl-research, in one process."""
    work = WORKLOADS[workload]
    work = replace(work, rounds=options.rounds or work.rounds, per_round=options.per_round or work.per_round)
    inputs, labels = make_data(work)
    milliseconds = pfl_round_ms(work, (inputs.to(options.device), labels.to(options.device)))
    return None if milliseconds is None else {"workload": workload, "engine": "pfl", "round_ms": milliseconds}


def show(result: dict[str, Any]) -> None:
    print("|", " | ".join(str(result.get(column, "")) for column in COLUMNS), "|", flush=True)


def main() -> None:
    parser = make_parser()
    parser.description = __doc__
    parser.set_defaults(device="cuda")
    parser.add_argument("--workloads", choices=WORKLOADS, nargs="+", default=list(WORKLOADS), help="which to measure")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("torch finds no GPU here; --device cpu tries the script without one.")
    prepare_process(options.threads)
    is_first = int(os.environ.get("RANK", 0)) == 0
    differing = []
    if is_first:
        print(torch.cuda.get_device_name() if options.device == "cuda" else "CPU", f"torch {torch.__version__}")
        print("|", " | ".join(COLUMNS), "|\n|", " | ".join("---" for _ in COLUMNS), "|")
    for workload in options.workloads:
        for engine in ENGINES:
            try:
                result = measure(workload, engine, options)
            except MisconfigurationException:  # it can't train several clients in one step
                if not engine.startswith("captured"):
                    raise
                result = {"workload": workload, "engine": engine}
            if is_first:
                show(result)
                if not result.get("largest_difference", 0.0) <= TOLERANCE:
                    differing.append(f"{workload} ({engine})")
        if is_first and (result := measure_pfl(workload, options)) is not None:
            show(result)
    if differing:
        sys.exit(f"The final weights differ from the plain loop's by more than {TOLERANCE}: {', '.join(differing)}.")


if __name__ == "__main__":
    main()
