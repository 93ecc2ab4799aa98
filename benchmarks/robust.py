"""Robust rules: what they cost, and which attacks they withstand.

    python benchmarks/robust.py cost --ranks 2
    python benchmarks/robust.py table --seeds 0 1 2 --out docs/experiments/robust.csv --picture docs/images/robust.svg

``cost`` times each rule over 100 clients with a million float32 parameters each, beside one all-reduce of as many on
the same ranks, and prints the memory that the kernel has counted on a rank.

``table`` runs ``recipes/digits_byzantine.yaml`` (softmax regression on the digits, 4 attackers among 20 clients, 60
rounds) by LightningCLI with each rule under each attack, and prints the accuracy of the last round, the mean over the
seeds. With ``--out`` each run is written down when it ends, and those that are there are not run again.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import gc
import json
import logging
import os
import statistics
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

import lightning_fl as fl
from lightning_fl.aggregation import Aggregator, RoundContext
from lightning_fl.cli import FederatedCLI, recipes_directory
from lightning_fl.communication import Group, LocalGroup, Message, TorchGroup
from lightning_fl.types import Update

NUM_CLIENTS, SIZE = 100, 1_000_000
MIB = 2**20

RULES: dict[str, Aggregator] = {
    "mean": fl.aggregation.WeightedMean(),
    "Median": fl.aggregation.Median(0.2),
    "TrimmedMean": fl.aggregation.TrimmedMean(0.2),
    "MeanAroundMedian": fl.aggregation.MeanAroundMedian(0.2),
    "Krum": fl.aggregation.Krum(0.2),
    "MultiKrum": fl.aggregation.MultiKrum(0.2),
    "Bulyan": fl.aggregation.Bulyan(0.2),
    "GeometricMedian": fl.aggregation.GeometricMedian(0.2),
    "RFA": fl.aggregation.GeometricMedian(0.2, iterations=3),
    "CenteredClipping": fl.aggregation.CenteredClipping(1.0, 3, 0.2),
    "NormBound": fl.aggregation.NormBound(None, 0.2),
    "FLTrust": fl.aggregation.FLTrust(0, 0.2),
    "DnC": fl.aggregation.DnC(0.2),
    "FLAME": fl.aggregation.FLAME(0.2),
    "FoolsGold": fl.aggregation.FoolsGold(0.2),
    "FoolsGold, one round": fl.aggregation.FoolsGold(0.2, memory=False),
    "Screened": fl.aggregation.Screened(num_attackers=0.2),
    "NNM + TrimmedMean": fl.aggregation.TrimmedMean(0.2, [fl.aggregation.NearestNeighborMixing()]),
}
ATTACKS: dict[str, Any] = {
    "none": None,
    "sign x 5": fl.attacks.SignFlip(5.0),
    "Gaussian": fl.attacks.GaussianNoise(1.0),
    "lazy": fl.attacks.Lazy(),
    "ALIE": fl.attacks.ALIE(),
    "IPM 10": fl.attacks.IPM(10.0),
    "min-max": fl.attacks.MinMax(),
    "min-sum": fl.attacks.MinSum(),
    "mimic": fl.attacks.Mimic(),
    "label flip": fl.attacks.LabelFlip(),
}
HOLD = ("MultiKrum", "FLAME", "NNM + TrimmedMean")
"""The rules that withstand all of these attacks."""
TELLING = ("none", "sign x 5", "ALIE", "IPM 10", "lazy")
TABLES = (
    (("mean", "Median", "Krum", *HOLD), TELLING),
    (HOLD, tuple(attack for attack in ATTACKS if attack not in TELLING)),
)
"""What is published: some rules under the attacks that tell them apart, and those that hold under all others."""


# ---- cost


@dataclass(frozen=True)
class Cost:
    """What a rule took on a rank.

    Args:
        seconds: Of wall clock.
        cpu_seconds: Of this process.
        sent: Bytes that this rank has sent to others, counted at the collectives.
        peak: The most bytes of memory beyond those before the rows came.
    """

    seconds: float
    cpu_seconds: float
    sent: int
    peak: int


def memory(name: str) -> int:
    """Bytes of this process in the kernel's books: ``VmHWM`` is the most it had."""
    line = next(
        line for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines() if line.startswith(name)
    )
    return int(line.split()[1]) * 1024


def fresh_peak() -> int:
    """Gives memory that is free back to the kernel, lets ``VmHWM`` start anew, and returns it."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return memory("VmHWM")


def measure(
    rule: Aggregator, group: Group, updates: Sequence[Update], clients: Sequence[int], total: int, silos: bool = False
) -> Cost:
    """What ``rule`` takes for the updates of this rank's ``clients`` among ``total``."""
    ctx, sent = RoundContext(0, range(total), total, silos=silos), [0]
    for name in ("all_reduce", "all_to_all"):
        setattr(group, name, counted(getattr(type(group), name).__get__(group), sent, group))
    before, start, cpu = fresh_peak(), time.perf_counter(), time.process_time()
    acc = rule.init(updates[0], torch.device("cpu"))
    for client, update in zip(clients, updates, strict=True):
        acc = rule.add(acc, update, replace(ctx, client=client))
    acc, _ = rule.merge(acc, group, Message(), ctx)
    rule.result(acc, ctx).mean()
    return Cost(time.perf_counter() - start, time.process_time() - cpu, sent[0], memory("VmHWM") - before)


def counted(collective: Any, sent: list[int], group: Group) -> Any:
    """The collective, which counts the bytes of what it is given for others; an all-reduce's once."""

    def call(own: Any, *args: Any) -> Any:
        if isinstance(own, torch.Tensor):
            sent[0] += own.numel() * own.element_size() if group.size > 1 else 0
        else:
            sent[0] += sum(part.numel() * part.element_size() for rank, part in enumerate(own) if rank != group.rank)
        return collective(own, *args)

    return call


def cost_on_rank(rank: int, ranks: int, port: int, names: Sequence[str]) -> None:
    """Measures on one rank; rank 0 prints, of all ranks the most."""
    torch.set_num_threads(1)
    group: Group = LocalGroup()
    if ranks > 1:
        store = dist.TCPStore("127.0.0.1", port, is_master=False)
        group = TorchGroup(store, rank, ranks, torch.device("cpu"), timedelta(minutes=10))
    generator, clients = torch.Generator().manual_seed(rank), range(rank, NUM_CLIENTS, ranks)
    updates = [Update({"w": torch.randn(SIZE, generator=generator)}) for _ in clients]
    reduced = updates[0].delta["w"]
    group.all_reduce(reduced)  # the first one connects
    start = time.perf_counter()
    group.all_reduce(reduced)
    all_reduce = time.perf_counter() - start
    rows = len(clients) * SIZE * 4 / MIB
    if rank == 0:
        print(f"{ranks} ranks; an all-reduce of {SIZE:,} float32 takes {all_reduce:.3f} s; rows a rank: {rows:.0f} MiB")
        print(
            "| rule | seconds | CPU seconds | MB sent | MiB at the peak | beyond the rows |\n|---|---|---|---|---|---|"
        )
    for name in names:
        own = measure(RULES[name], group, updates, clients, NUM_CLIENTS)
        values = [message.fields["own"] for message in group.all_gather(Message({"own": list(vars(own).values())}))]
        found = Cost(*(max(column) for column in zip(*values, strict=True)))
        if rank == 0:
            beyond = found.peak / MIB - (0 if name == "mean" else rows)
            figures = f"{found.seconds:.2f} | {found.cpu_seconds:.2f} | {found.sent / 1e6:.1f}"
            print(f"| {name} | {figures} | {found.peak / MIB:.0f} | {beyond:.0f} |", flush=True)


def cost(names: Sequence[str], ranks: int) -> None:
    """Prints seconds, traffic and memory of each rule."""
    # Else free memory stays in the heap, and the kernel counts it.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(1 << 16)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    torch.multiprocessing.spawn(cost_on_rank, (ranks, store.port, names), nprocs=ranks)


# ---- attacks x rules


def as_yaml(value: Any) -> Any:
    """What a configuration says for this object."""
    if isinstance(value, list | tuple):
        return [as_yaml(item) for item in value]
    if not is_dataclass(value):
        return value
    own = {field.name: as_yaml(getattr(value, field.name)) for field in fields(value)}
    return {"class_path": f"{type(value).__module__}.{type(value).__name__}", "init_args": own}


def accuracy(rule: str, attack: str, seed: int, *options: str) -> float:
    """The accuracy after the last round of the recipe with this rule under this attack."""
    adversary = {
        "class_path": "lightning_fl.attacks.Adversary",
        "init_args": {"attack": as_yaml(ATTACKS[attack]), "clients": 0.2},
    }
    changes = {
        "seed_everything": seed,
        "trainer.strategy.init_args.aggregator": None if rule == "mean" else as_yaml(RULES[rule]),
        "trainer.strategy.init_args.adversary": None if attack == "none" else adversary,
        "trainer.check_val_every_n_epoch": 60,
        "trainer.num_sanity_val_steps": 0,
    }
    return run_recipe("digits_byzantine.yaml", changes, *options)["val_acc"]


def run_recipe(name: str, changes: Mapping[str, Any], *options: str) -> dict[str, float]:
    """The metrics after a recipe with changes, by LightningCLI; further options come last."""
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    changes = {f"trainer.{option}": False for option in quiet} | dict(changes)
    words = [word for key, value in changes.items() for word in (f"--{key}", json.dumps(value))]
    sys.argv = ["lightning-fl"]
    trainer = FederatedCLI(["fit", "--config", str(recipes_directory() / name), *words, *options]).trainer
    return {key: float(value) for key, value in trainer.callback_metrics.items()}


Found = dict[tuple[str, str, int], float]


def read(path: Path | None) -> Found:
    """The runs that are written down."""
    with suppress(FileNotFoundError), (path or Path()).open(encoding="utf-8", newline="") as file:
        return {(row["rule"], row["attack"], int(row["seed"])): float(row["accuracy"]) for row in csv.DictReader(file)}
    return {}


def write(found: Found, path: Path | None) -> None:
    """Writes the runs down, in the order of the table."""
    if path is None:
        return
    order = sorted(found, key=lambda key: (list(RULES).index(key[0]), list(ATTACKS).index(key[1]), key[2]))
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(("rule", "attack", "seed", "accuracy"))
        rows.writerows((*key, f"{found[key]:.4f}") for key in order)


def run_table(rules: Sequence[str], attacks: Sequence[str], seeds: Sequence[int], out: Path | None) -> Found:
    """Runs what is not there yet."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    found = read(out)
    for key in ((rule, attack, seed) for seed in seeds for attack in attacks for rule in rules):
        if key not in found:
            found[key] = accuracy(*key)
            write(found, out)
    return found


def table(found: Found, rules: Sequence[str], attacks: Sequence[str], seeds: Sequence[int]) -> list[str]:
    """The lines of the table: the mean over the seeds, and in brackets the lowest."""
    lines = [f"| rule | {' | '.join(attacks)} |", f"|---|{'---|' * len(attacks)}"]
    for rule in rules:
        cells = [[found[rule, attack, seed] for seed in seeds] for attack in attacks]
        shown = [f"{statistics.fmean(cell):.3f} ({min(cell):.3f})" for cell in cells]
        lines.append(f"| {rule} | {' | '.join(shown)} |")
    return lines


def draw(found: Found, rules: Sequence[str], attacks: Sequence[str], seeds: Sequence[int], path: Path) -> None:
    """Draws the means as a heat map."""
    from matplotlib.figure import Figure

    means = [[statistics.fmean(found[rule, attack, seed] for seed in seeds) for attack in attacks] for rule in rules]
    figure = Figure(figsize=(1.0 + 0.75 * len(attacks), 1.2 + 0.36 * len(rules)), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(means, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    axes.set_xticks(range(len(attacks)), attacks, rotation=30, ha="right")
    axes.set_yticks(range(len(rules)), rules)
    for y, row in enumerate(means):
        for x, value in enumerate(row):
            axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=8)
    axes.set_title("accuracy on digits, 4 attackers among 20 clients")
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("cost", "table"))
    parser.add_argument("--rules", nargs="+", choices=list(RULES), help="default: those that are published, or all")
    parser.add_argument("--attacks", nargs="+", choices=list(ATTACKS), help="default: those that are published, or all")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, help="a CSV file")
    parser.add_argument("--picture", type=Path, help="an image file, of the first table")
    args = parser.parse_args()
    if args.what == "cost":
        cost(args.rules or list(RULES), args.ranks)
        return
    own = ((args.rules or TABLES[0][0], args.attacks or list(ATTACKS)),)
    tables = own if args.rules or args.attacks else TABLES
    for rules, attacks in tables:
        found = run_table(rules, attacks, args.seeds, args.out)
        print("\n".join([*table(found, rules, attacks, args.seeds), ""]))
    if args.picture is not None:
        draw(found, *tables[0], args.seeds, args.picture)


if __name__ == "__main__":
    main()
