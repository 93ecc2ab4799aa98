"""The data: a CSV file with a column that names the site of each row. Put your own file and columns here."""

import csv

import lightning as L
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, TensorDataset

import lightning_fl as fl

CLIENT, LABEL = "site", "failed"
FEATURES = ("temperature", "vibration", "pressure", "current")


def read_sites(path: str) -> dict[str, dict[str, TensorDataset]]:
    """The rows of each site: of every five, one for validation ("val"), one for testing ("test"), three to train on."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    sites = {}
    for site in sorted({row[CLIENT] for row in rows}):
        own = [row for row in rows if row[CLIENT] == site]
        x = torch.tensor([[float(row[name]) for name in FEATURES] for row in own])
        y = torch.tensor([int(row[LABEL]) for row in own])
        place = torch.arange(len(own)) % 5
        rows_of = {"val": place == 0, "test": place == 1, "train": place > 1}
        sites[site] = {name: TensorDataset(x[chosen], y[chosen]) for name, chosen in rows_of.items()}
    return sites


class SiteData(L.LightningDataModule):
    """All sites in one process: a simulation, or the centralised baseline with --trainer.strategy auto."""

    def __init__(self, path: str = "readings.csv", batch_size: int = 16) -> None:
        super().__init__()
        self.path = path
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        self.sites = read_sites(self.path)

    def train_dataloader(self) -> fl.datamodules.ClientLoaders | DataLoader:
        if not getattr(self.trainer.strategy, "is_federated", False):
            return self._loader(self._pooled("train"))
        return fl.datamodules.ClientLoaders({site: self._loader(rows["train"]) for site, rows in self.sites.items()})

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self._pooled("val"), batch_size=256)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self._pooled("test"), batch_size=256)

    def predict_dataloader(self) -> DataLoader:
        return self.test_dataloader()

    def _pooled(self, name: str) -> ConcatDataset:
        return ConcatDataset([rows[name] for rows in self.sites.values()])

    def _loader(self, rows: Dataset) -> DataLoader:
        return DataLoader(rows, batch_size=self.batch_size, shuffle=True)


class SiloData(L.LightningDataModule):
    """One site, whose process sees nothing of the others. See silos.sh."""

    def __init__(self, sites: list[str], path: str = "readings.csv", batch_size: int = 16) -> None:
        super().__init__()
        self.sites = sites
        self.path = path
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        # Rank 0 is the first site, and so on. A real site has its own file, and reads only that.
        self.rows = read_sites(self.path)[self.sites[self.trainer.global_rank]]

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.rows["train"], batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.rows["val"], batch_size=256)
