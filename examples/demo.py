"""Trains 10 simulated clients on handwritten digits, then the same YAML without a federation, and compares the two."""

from __future__ import annotations

import csv
import logging
import time
import warnings
from collections import defaultdict
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from rich.console import Console
from rich.table import Table

from lightning_fl.cli import FederatedCLI, recipes_directory

RECIPE = recipes_directory() / "digits_fedavg.yaml"
QUIET = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
COLUMNS = ("train_loss", "val_loss", "val_acc")


def train(*options: str) -> Trainer:
    """Runs ``lightning-fl fit`` on the recipe."""
    return FederatedCLI(["fit", "--config", str(RECIPE), *QUIET, *options]).trainer


def metrics_by_round(trainer: Trainer) -> dict[int, dict[str, float]]:
    """What the trainer's CSV logger wrote, by epoch, which is the round."""
    rounds: dict[int, dict[str, float]] = defaultdict(dict)
    with Path(trainer.log_dir or "", "metrics.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            rounds[int(row["epoch"])] |= {name: float(row[name]) for name in COLUMNS if row.get(name)}
    return rounds


def main() -> None:
    torch.set_num_threads(1)  # the model is too small for more
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.simplefilter("ignore")
    console = Console()

    console.print("Training 10 simulated clients with FedAvg ...")
    start = time.perf_counter()
    federated = train()
    seconds = time.perf_counter() - start
    rounds = metrics_by_round(federated)
    table = Table("round", *COLUMNS)
    for number, metrics in rounds.items():
        table.add_row(str(number + 1), *(f"{metrics[name]:.4f}" for name in COLUMNS))
    console.print(table)

    console.print("Training the same YAML on all the data together, --trainer.strategy auto ...")
    centralised = metrics_by_round(train("--trainer.strategy", "auto"))
    last = max(rounds)
    console.print(f"final accuracy, federated:   {rounds[last]['val_acc']:.4f}  ({last + 1} rounds in {seconds:.1f} s)")
    console.print(f"final accuracy, centralised: {centralised[max(centralised)]['val_acc']:.4f}")
    checkpoint = federated.checkpoint_callback
    console.print(f"checkpoint: {getattr(checkpoint, 'best_model_path', '')}", soft_wrap=True)


if __name__ == "__main__":
    main()
