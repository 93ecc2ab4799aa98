"""A CSV file with a client column, federated and centralised: all that a user of a table needs to write."""

import csv
import random
import sys

import lightning as L

import lightning_fl as fl
from lightning_fl.models import TabularMLP


def write_visits(path: str) -> None:
    """Visits to hospitals, each with patients of another age: returns the older, sooner the smokers."""
    random.seed(0)
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["hospital", "age", "weight", "smokes", "returns"])
        for _ in range(3000):
            hospital = random.randrange(8)
            age, smokes = random.gauss(30 + 5 * hospital, 12), random.choice(["yes", "no", "no"])
            risk = age + (15 if smokes == "yes" else 0) + random.gauss(0, 5)
            table.writerow([f"hospital-{hospital}", round(age), round(random.gauss(75, 9)), smokes, risk > 55])


def train(strategy: str) -> float:
    L.seed_everything(0, verbose=False)
    data = fl.datamodules.TabularDataModule("visits.csv", "returns", client="hospital", drop=["weight"], batch_size=64)
    data.setup()
    model = TabularMLP(data.num_features, num_classes=data.num_classes, lr=0.1)
    trainer = L.Trainer(strategy=strategy, max_epochs=10, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit(model, data)
    return trainer.callback_metrics["val_acc"].item()


if __name__ == "__main__":
    write_visits("visits.csv")
    print(*(f"{name}: {train(name):.3f}" for name in sys.argv[1:] or ["fedavg", "auto"]), sep="\n")
