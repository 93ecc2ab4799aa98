"""What privacy costs in accuracy: logistic regression on Fashion-MNIST at several epsilons, at both levels.

    python benchmarks/privacy_accuracy.py

- examples: ``recipes/fashion_dp.yaml``, 10 clients of 6,000 images, all of them in each of 10 rounds;
- clients: 1,000 clients of 60 images, each in a round with probability 0.1, 50 rounds of ``ClientLevelDP``.

An epsilon of infinity is clipping without noise. Numbers and plot go to docs/experiments/; a finished run is never
repeated. The noise is new in each run.
"""

from __future__ import annotations

import argparse
import csv
import math
import tempfile
from pathlib import Path
from typing import Any

import lightning as L
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from workloads import QUIET

import lightning_fl as fl
from lightning_fl.models import LogisticRegression

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "experiments"
COLUMNS = ("level", "epsilon", "repeat", "noise_multiplier", "found_epsilon", "val_acc", "val_loss")
EPSILONS = (0.5, 1.0, 2.0, 4.0, 8.0, math.inf)
DELTA = 1e-5
RATE, ROUNDS_OF_CLIENTS = 0.1, 50


def data(num_clients: int, batch_size: int) -> L.LightningDataModule:
    """Fashion-MNIST, spread at random."""
    return fl.datamodules.PartitionedDataModule(
        fl.datamodules.FashionMNISTDataModule(batch_size=batch_size), fl.datamodules.IID(), num_clients=num_clients
    )


def examples(epsilon: float) -> tuple[dict[str, Any], L.LightningDataModule, float]:
    """Options of the Trainer, data and learning rate for privacy of examples."""
    noise: dict[str, float] = {"noise_multiplier": 0.0} if epsilon == math.inf else {"target_epsilon": epsilon}
    private = fl.callbacks.SampleLevelDP(**noise, delta=DELTA)  # type: ignore[arg-type]
    return {"strategy": fl.FederatedStrategy(), "max_epochs": 10, "callbacks": [private]}, data(10, 600), 4.0


def clients(epsilon: float) -> tuple[dict[str, Any], L.LightningDataModule, float]:
    """The same for privacy of clients."""
    noise = 0.0
    if epsilon < math.inf:
        noise = fl.privacy.noise_multiplier_for(epsilon, DELTA, ROUNDS_OF_CLIENTS, fl.privacy.Poisson(RATE))
    transforms = [fl.privacy.ClientLevelDP(clip=0.5, noise_multiplier=noise, delta=DELTA)]
    strategy = fl.FederatedStrategy(cohort=fl.clients.Poisson(RATE), local_epochs=2, transforms=transforms)
    return {"strategy": strategy, "max_epochs": ROUNDS_OF_CLIENTS}, data(1000, 10), 0.05


def run(level: str, epsilon: float, repeat: int) -> dict[str, Any]:
    """Trains once; the row of the results."""
    L.seed_everything(repeat)
    options, datamodule, lr = {"examples": examples, "clients": clients}[level](epsilon)
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            **options,
            **QUIET,
            default_root_dir=folder,
            check_val_every_n_epoch=options["max_epochs"],
        )
        trainer.fit(LogisticRegression(lr=lr), datamodule)
    entry = trainer.strategy.history[-1]  # type: ignore[attr-defined]
    return {
        "level": level,
        "epsilon": epsilon,
        "repeat": repeat,
        "noise_multiplier": round(entry.get("dp_noise_multiplier", 0.0), 4),
        "found_epsilon": round(entry.get("dp_epsilon", math.inf), 4),
        "val_acc": round(float(trainer.callback_metrics["val_acc"]), 4),
        "val_loss": round(float(trainer.callback_metrics["val_loss"]), 4),
    }


def read(path: Path) -> list[dict[str, Any]]:
    """The rows that are there."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8") as file:
        kinds = (str, float, int, float, float, float, float)
        return [{k: kind(row[k]) for k, kind in zip(COLUMNS, kinds, strict=True)} for row in csv.DictReader(file)]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes the rows in an order that does not depend on that of the runs."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda row: (row["level"], row["epsilon"], row["repeat"])))


def plot(path: Path, rows: list[dict[str, Any]]) -> None:
    """Accuracy over epsilon, each run a point, with clipping alone as dotted lines."""
    figure, axes = plt.subplots(figsize=(6, 4))
    for color, level in zip(("C0", "C1"), ("examples", "clients"), strict=True):
        own = [row for row in rows if row["level"] == level and row["epsilon"] < math.inf]
        means = {
            epsilon: [row["val_acc"] for row in own if row["epsilon"] == epsilon]
            for epsilon in sorted({row["epsilon"] for row in own})
        }
        axes.plot(list(means), [sum(values) / len(values) for values in means.values()], color=color, label=level)
        axes.scatter([row["epsilon"] for row in own], [row["val_acc"] for row in own], color=color, s=12)
        for row in (row for row in rows if row["level"] == level and row["epsilon"] == math.inf):
            axes.axhline(row["val_acc"], color=color, linestyle=":", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set_xticks(EPSILONS[:-1], [f"{epsilon:g}" for epsilon in EPSILONS[:-1]])
    axes.set_xlabel("epsilon at delta 1e-5")
    axes.set_ylabel("accuracy on the test data")
    axes.legend(title="private are")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=1)
    args = parser.parse_args()
    table = RESULTS / "privacy_accuracy.csv"
    for repeat in range(args.repeats):
        for level in ("examples", "clients"):
            for epsilon in EPSILONS:
                rows = read(table)
                if not any((row["level"], row["epsilon"], row["repeat"]) == (level, epsilon, repeat) for row in rows):
                    row = run(level, epsilon, repeat)
                    print(row, flush=True)
                    write(table, [*rows, row])
    plot(RESULTS / "privacy_accuracy.png", read(table))


if __name__ == "__main__":
    main()
