"""A reference model for vertical training, and a real data set split by columns."""

from __future__ import annotations

from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_fl.datamodules.datasets.sklearn_data import check_test_share, load, stratified_split
from lightning_fl.vertical.loader import aligned_loader
from lightning_fl.vertical.strategy import Party, VerticalStrategy


class BreastCancerPartiesDataModule(L.LightningDataModule):
    """The Wisconsin breast cancer table, with its 30 columns divided equally among the parties.

    Args:
        batch_size: Number of rows in a batch. Default 32.
        val_share: Share of the rows that is held out. Default 0.2.
        seed: Seed of the split and of the order of batches; the same at all parties. Default 0.

    Raises:
        ValueError: If an argument is out of range, or the strategy is not a :class:`VerticalStrategy`.
        ImportError: On setup, if scikit-learn is not installed.
    """

    def __init__(self, batch_size: int = 32, val_share: float = 0.2, seed: int = 0) -> None:
        super().__init__()
        self.batch_size, self.val_share, self.seed = batch_size, check_test_share(val_share), seed

    def setup(self, stage: str) -> None:
        """Reads this party's columns, and the labels at the party that has them."""
        strategy = self.trainer.strategy if self.trainer is not None else None
        if not isinstance(strategy, VerticalStrategy) or strategy.group is None:
            raise ValueError("BreastCancerPartiesDataModule divides columns among the parties of a VerticalStrategy.")
        features, labels = load("load_breast_cancer", type(self).__name__)
        self._train, self._val = stratified_split(labels, self.val_share, self.seed)
        own = features[:, np.array_split(np.arange(features.shape[1]), strategy.group.size)[strategy.group.rank]]
        own = (own - own[self._train].mean(0)) / own[self._train].std(0)
        self.num_features = own.shape[1]
        self._tensors = [torch.from_numpy(own).float()]
        if strategy.has_labels:
            self._tensors.append(torch.from_numpy(labels).long())

    def train_dataloader(self) -> DataLoader:
        """The training rows, shuffled in each epoch."""
        rows = self._train.tolist()
        return aligned_loader(self._rows(rows), rows, self.batch_size, shuffle=True, seed=self.seed)

    def val_dataloader(self) -> DataLoader:
        """The held-out rows."""
        rows = self._val.tolist()
        return aligned_loader(self._rows(rows), rows, self.batch_size)

    def _rows(self, rows: list[int]) -> Dataset:
        return TensorDataset(*(tensor[rows] for tensor in self._tensors))


class SplitClassifier(Party):
    """A layer for each party's columns, and a classifier on top at the party with the labels.

    Args:
        width: Number of activations that a party sends for each row. Default 8.
        num_classes: Number of classes. Default 2.
        lr: Adam's learning rate. Default 0.01.
    """

    def __init__(self, width: int = 8, num_classes: int = 2, lr: float = 0.01) -> None:
        super().__init__()
        self.width, self.num_classes, self.lr = width, num_classes, lr
        self.bottom: nn.Module | None = None

    def configure_model(self) -> None:
        """Creates the layers, whose sizes depend on the data and the number of parties."""
        if self.bottom is not None:
            return
        num_features = self.trainer.datamodule.num_features  # type: ignore[attr-defined]
        self.bottom = nn.Sequential(nn.Linear(num_features, self.width), nn.Tanh())
        group = self.vertical.group
        if self.has_labels and group is not None:
            self.top = nn.Linear(group.size * self.width, self.num_classes)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self._step(batch, "train")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._step(batch, "val")

    def _step(self, batch: Any, stage: Literal["train", "val"]) -> Tensor:
        assert self.bottom is not None
        parts = self.exchange(self.bottom(batch[0]))
        if not self.has_labels:
            return parts
        logits = self.top(torch.cat(parts, 1))
        loss = functional.cross_entropy(logits, batch[1])
        accuracy = (logits.argmax(1) == batch[1]).float().mean()
        self.log_dict({f"{stage}_loss": loss, f"{stage}_acc": accuracy}, on_step=False, on_epoch=True, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), self.lr)
