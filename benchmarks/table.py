"""Runs benchmarks/simulation.py case by case; numbers, table and plot go to docs/experiments/.

    python benchmarks/table.py                            # what is not there yet, three runs of each case: hours
    python benchmarks/table.py --only "W1, auto" start-up
    python benchmarks/table.py --only "W1, auto" --again  # instead of what is there

A finished run is never repeated unless ``--again`` asks for it; its old line is then replaced. Each run is a process of
its own. ``start-up`` is a fit of one round of W1, its Trainer included, beside a plain Trainer's of as many batches.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from simulation import fit
from table_page import COHORTS, ENGINES, PER_STEP, SECONDS, START_UP, page, plot, tables
from torch.utils.data import DataLoader
from workloads import QUIET, WORKLOADS, Module, batches_of, make_data, prepare_process

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "docs" / "experiments" / "simulation.csv"
FIGURES = ("ratio", "round_ms", "plain_ms", "communicate_ms", "peak_growth_mb", "largest_difference")
COLUMNS = ("case", "run", "rounds", *FIGURES, *SECONDS, "date", "machine", "versions")


@dataclass(frozen=True)
class Case:
    """One way to run benchmarks/simulation.py: its options, and the number of processes."""

    options: str
    ranks: int = 1


OPTIONS = {
    "1 process": Case("--threads 1"),
    "2 threads": Case("--threads 2"),
    "2 processes": Case("--threads 1", ranks=2),
    "logs": Case("--threads 1 --logs"),
}
CASES = {
    **{
        f"{workload}, {engine}, {setting}": Case(f"--workload {workload} --engine {engine} {case.options}", case.ranks)
        for workload in WORKLOADS
        for engine in ENGINES
        for setting, case in OPTIONS.items()
    },
    **{name: Case(f"--clients-per-step {n}") for n, name in PER_STEP.items() if n > 1},
    **{name: Case(f"--per-round {n}") for n, name in COHORTS.items() if n != 100},
    START_UP: Case(""),
}


def process(*words: str) -> dict[str, Any]:
    """Runs Python; its last line, also if the check of the weights then failed: the table shows by how much."""
    done = subprocess.run([sys.executable, *words], stdout=subprocess.PIPE, text=True)
    if not done.stdout:
        done.check_returncode()
    return json.loads(done.stdout.splitlines()[-1])


def run(name: str, rounds: int | None) -> dict[str, Any]:
    """Runs a case once; its figures."""
    if name == START_UP:
        first = {kind: process(__file__, "--start-up", kind) for kind in ("federated", "plain")}
        warm = {kind: statistics.mean(found[kind] for found in first.values()) for kind in first}
        cold = {kind: first[kind]["first"] for kind in first}
        values = (cold["federated"], cold["plain"], warm["federated"], warm["plain"])
        return {name: round(value, 3) for name, value in zip(SECONDS, values, strict=True)}
    case = CASES[name]
    options = case.options.split() + ["--check"] + (["--rounds", str(rounds)] if rounds else [])
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(case.ranks)]
    found = process(*(launcher if case.ranks > 1 else []), str(HERE / "simulation.py"), *options)
    return {column: found[column] for column in ("rounds", *FIGURES)}


def seconds_of_fit(kind: str, data: Any) -> float:
    """One round of W1, the making of the Trainer included, or a plain Trainer's fit of as many batches."""
    work = WORKLOADS["W1"]
    module = Module(work)
    start = time.perf_counter()
    if kind == "federated":
        fit(module, work, data, rounds=1)
    else:
        batches = [batch for client in range(work.per_round) for batch in batches_of(client, data, work)]
        L.Trainer(max_epochs=1, **QUIET).fit(module, DataLoader(batches, batch_size=None))
    return time.perf_counter() - start


def start_up(first: str) -> dict[str, float]:
    """Seconds of the process's first fit, of the kind ``first``, and medians of three of each once both are warm."""
    prepare_process()
    data, kinds = make_data(WORKLOADS["W1"]), ("federated", "plain")
    cold = seconds_of_fit(first, data)
    for kind in kinds:
        seconds_of_fit(kind, data)
    warm = [{kind: seconds_of_fit(kind, data) for kind in kinds} for _ in range(3)]
    return {"first": cold, **{kind: statistics.median(both[kind] for both in warm) for kind in kinds}}


def facts() -> dict[str, str]:
    """When and on what a run is made."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, Lightning {L.__version__}"
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{name}, {os.cpu_count()} cores, {platform.system()}",
        "versions": versions,
    }


def read(path: Path) -> list[dict[str, str]]:
    """The runs that are there."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes the runs in an order that does not depend on when they were made."""
    names = list(CASES)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda row: (names.index(row["case"]), int(row["run"]))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(CASES), help="only cases whose names begin so")
    parser.add_argument("--runs", type=int, default=3, help="runs of each case")
    parser.add_argument("--rounds", type=int, help="of each run; default those of the workload")
    parser.add_argument("--again", action="store_true", help="also what is there")
    parser.add_argument("--start-up", choices=["federated", "plain"], help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.start_up:
        print(json.dumps(start_up(words.start_up)))
        return
    names = [name for name in CASES if name.startswith(tuple(words.only))]
    if not names:
        parser.error(f"--only {' '.join(words.only)}: no case begins so; there are: {'; '.join(CASES)}.")
    for index in range(1, words.runs + 1):
        for name in names:
            others = [row for row in read(RESULTS) if (row["case"], row["run"]) != (name, str(index))]
            if words.again or len(others) == len(read(RESULTS)):
                row = {"case": name, "run": index, **run(name, words.rounds), **facts()}
                write(RESULTS, [*others, row])
                print(json.dumps(row), flush=True)
    rows = read(RESULTS)
    plot(RESULTS.with_suffix(".png"), rows)
    RESULTS.with_suffix(".md").write_text(page(rows), encoding="utf-8")
    print(tables(rows)["engines"])


if __name__ == "__main__":
    main()
