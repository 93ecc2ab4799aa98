"""Assigns natural clients to silos, to try silos on existing data."""

from __future__ import annotations

from typing import Any

import lightning as L
from torch.utils.data import ConcatDataset, DataLoader, Dataset

from lightning_fl.data.holdout import Part
from lightning_fl.datamodules.loader_hooks import wants_client_loaders
from lightning_fl.datamodules.natural import NaturalDataModule


class SiloClients(L.LightningDataModule):
    """Assigns the clients of a data set to silos and pools each silo's data; for a trial on one machine.

    Silo i of n gets every n-th client, starting at the i-th, for training and validation. A strategy that is not
    federated gets the data of all clients, which is the centralised baseline.

    Args:
        data: The data, such as :class:`~lightning_fl.datamodules.ShakespeareDataModule`; its ``batch_size`` is per
            process.
        silo: Index of the silo that this process belongs to. None: its rank.
        num_silos: Number of silos. None: the number of ranks of the federation.

    Raises:
        ValueError: If only one of ``silo`` and ``num_silos`` is given, or ``silo`` is out of range.
    """

    def __init__(self, data: NaturalDataModule, silo: int | None = None, num_silos: int | None = None) -> None:
        super().__init__()
        if (silo is None) != (num_silos is None) or (silo is not None and silo not in range(num_silos or 0)):
            raise ValueError(f"silo={silo} of num_silos={num_silos}: give both, with silo from 0 to num_silos - 1.")
        self.data = data
        self.silo, self.num_silos = silo, num_silos

    def setup(self, stage: str | None = None) -> None:
        """Reads the data."""
        self.data.setup(stage)

    def train_dataloader(self) -> DataLoader:
        """The silo's training data, shuffled."""
        return self.data.loader_of(self._part("train"), train=True)

    def val_dataloader(self) -> DataLoader:
        """The silo's validation data."""
        return self.data.loader_of(self._part("val" if self.data.holdout.val_share > 0 else "test"))

    def test_dataloader(self) -> DataLoader:
        """The silo's test data."""
        return self.data.loader_of(self._part("test"))

    def _part(self, part: Part) -> Dataset:
        silo, num_silos = self.silo, self.num_silos
        if not wants_client_loaders(self.trainer):
            silo, num_silos = 0, 1
        elif silo is None:
            strategy: Any = None if self.trainer is None else self.trainer.strategy
            silo, num_silos = (0, 1) if strategy is None else (strategy.federation.rank, strategy.federation.size)
        return ConcatDataset([self.data.client_dataset(own, part) for own in self.data.client_ids[silo::num_silos]])
