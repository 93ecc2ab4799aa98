"""The data: a CSV file with a column that says to which site a row belongs. Put your own file and columns here."""

import csv

import lightning as L
import torch
from torch.utils.data import ConcatDataset, DataLoader, TensorDataset

import lightning_fl as fl

CLIENT, LABEL = "site", "failed"
FEATURES = ("temperature", "vibration", "pressure", "current")


def read_sites(path: str) -> dict[str, tuple[TensorDataset, TensorDataset]]:
    """For each site its rows for training and, every fifth, for validation."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    sites = {}
    for site in sorted({row[CLIENT] for row in rows}):
        own = [row for row in rows if row[CLIENT] == site]
        x = torch.tensor([[float(row[name]) for name in FEATURES] for row in own])
        y = torch.tensor([int(row[LABEL]) for row in own])
        is_val = torch.arange(len(own)) % 5 == 0
        sites[site] = TensorDataset(x[~is_val], y[~is_val]), TensorDataset(x[is_val], y[is_val])
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
            pooled = ConcatDataset([train for train, _ in self.sites.values()])
            return DataLoader(pooled, batch_size=self.batch_size, shuffle=True)
        return fl.datamodules.ClientLoaders({site: self._loader(train) for site, (train, _) in self.sites.items()})

    def val_dataloader(self) -> DataLoader:
        return DataLoader(ConcatDataset([val for _, val in self.sites.values()]), batch_size=256)

    def _loader(self, train: TensorDataset) -> DataLoader:
        return DataLoader(train, batch_size=self.batch_size, shuffle=True)


class SiloData(L.LightningDataModule):
    """One site, whose process sees nothing of the others. See silos.sh."""

    def __init__(self, sites: list[str], path: str = "readings.csv", batch_size: int = 16) -> None:
        super().__init__()
        self.sites = sites
        self.path = path
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        # Rank 0 is the first site, and so on. A real site has a file of its own, and reads just that.
        self.train, self.val = read_sites(self.path)[self.sites[self.trainer.global_rank]]

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.val, batch_size=256)
