"""Robust rules: what they cost, and which attacks they withstand.

    python benchmarks/robust.py cost
    python benchmarks/robust.py table --out docs/images/robust.svg

``cost`` times each rule over 100 clients with a million float32 parameters each, on one core, and prints the memory
that it takes beyond the rows. ``table`` trains softmax regression on the digits under each attack with each
rule, and prints the accuracy of the last round as a table; with matplotlib it also draws it.
"""

from __future__ import annotations

import argparse
import logging
import resource
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import torch

import lightning_fl as fl
from lightning_fl.aggregation import Aggregator, RoundContext
from lightning_fl.communication import LocalGroup, Message
from lightning_fl.models import MLPClassifier
from lightning_fl.types import Update

NUM_CLIENTS, SIZE = 100, 1_000_000

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
    "DnC": fl.aggregation.DnC(0.2),
    "FLAME": fl.aggregation.FLAME(0.2),
    "FoolsGold": fl.aggregation.FoolsGold(0.2),
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


def cost(names: Sequence[str]) -> None:
    """Prints seconds and memory of each rule."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    updates = [Update({"w": torch.randn(SIZE, generator=generator)}) for _ in range(NUM_CLIENTS)]
    print("| rule | seconds | MiB beyond the rows |\n|---|---|---|")
    for name in names:
        rule = RULES[name]
        ctx, group = RoundContext(0, range(NUM_CLIENTS), NUM_CLIENTS), LocalGroup()
        start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        acc = rule.init(updates[0], torch.device("cpu"))
        for client, update in enumerate(updates):
            acc = rule.add(acc, update, replace(ctx, client=client))
        acc, _ = rule.merge(acc, group, Message(), ctx)
        rule.result(acc, ctx).mean()
        seconds, after = time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        rows = 0 if name == "mean" else NUM_CLIENTS * SIZE * 4 / 2**20
        print(f"| {name} | {seconds:.2f} | {max(0.0, (after - before) / 1024 - rows):.0f} |", flush=True)
        del acc


def accuracy(rule: Aggregator, attack: Any, seed: int, rounds: int) -> float:
    """The accuracy after the last round, with 4 attackers among 20 clients."""
    L.seed_everything(seed, verbose=False)
    adversary = None if attack is None else fl.attacks.Adversary(attack, clients=0.2)
    strategy = fl.FederatedStrategy("fedavg", local_steps=5, aggregator=rule, adversary=adversary, engine="vectorized")
    data = fl.datamodules.PartitionedDataModule(
        fl.datamodules.DigitsDataModule(batch_size=32), fl.datamodules.Dirichlet(0.5), num_clients=20
    )
    trainer = L.Trainer(
        strategy=strategy,
        max_epochs=rounds,
        check_val_every_n_epoch=rounds,
        num_sanity_val_steps=0,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(MLPClassifier(hidden=(), lr=0.3), data)
    return trainer.callback_metrics["val_acc"].item()


def table(rules: Sequence[str], attacks: Sequence[str], seeds: int, rounds: int, out: Path | None) -> None:
    """Prints the accuracies, the mean over the seeds, and draws them."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    print(f"| rule | {' | '.join(attacks)} |\n|---|{'---|' * len(attacks)}")
    found = []
    for name in rules:
        row = [
            sum(accuracy(RULES[name], ATTACKS[attack], seed, rounds) for seed in range(seeds)) / seeds
            for attack in attacks
        ]
        found.append(row)
        print(f"| {name} | {' | '.join(f'{value:.3f}' for value in row)} |", flush=True)
    if out is not None:
        draw(found, rules, attacks, out)


def draw(found: Sequence[Sequence[float]], rules: Sequence[str], attacks: Sequence[str], out: Path) -> None:
    """Draws the table as a heat map."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.0 + 0.75 * len(attacks), 1.2 + 0.36 * len(rules)), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(found, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    axes.set_xticks(range(len(attacks)), attacks, rotation=30, ha="right")
    axes.set_yticks(range(len(rules)), rules)
    for y, row in enumerate(found):
        for x, value in enumerate(row):
            axes.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=8)
    axes.set_title("accuracy on digits, 4 attackers among 20 clients")
    figure.savefig(out, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("cost", "table"))
    parser.add_argument("--rules", nargs="+", default=list(RULES), choices=list(RULES))
    parser.add_argument("--attacks", nargs="+", default=list(ATTACKS), choices=list(ATTACKS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.what == "cost":
        cost(args.rules)
    else:
        table(args.rules, args.attacks, args.seeds, args.rounds, args.out)


if __name__ == "__main__":
    main()
