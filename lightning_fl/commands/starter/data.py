"""The data: a CSV file with a column that says to which site a row belongs. Put your own file and columns here."""

import lightning as L
import numpy as np
import torch
from torch.utils.data import ConcatDataset, DataLoader, TensorDataset

import lightning_fl as fl


def read_sites(path: str) -> dict[str, tuple[TensorDataset, TensorDataset]]:
    """For each site its rows for training and, every fifth, for validation."""
    rows = np.genfromtxt(path, delimiter=",", names=True, dtype=None, encoding="utf-8")
    features = [name for name in rows.dtype.names if name not in ("site", "failed")]
    x = torch.tensor(np.stack([rows[name] for name in features], axis=1), dtype=torch.float32)
    y = torch.tensor(rows["failed"], dtype=torch.int64)
    sites = {}
    for site in np.unique(rows["site"]):
        own = torch.from_numpy(np.flatnonzero(rows["site"] == site))
        is_val = torch.arange(len(own)) % 5 == 0
        train, val = own[~is_val], own[is_val]
        sites[str(site)] = TensorDataset(x[train], y[train]), TensorDataset(x[val], y[val])
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
