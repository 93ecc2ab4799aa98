"""Handwritten digits that belong to silos: each process holds only its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset, TensorDataset

from lightning_fl.communication import LocalGroup
from lightning_fl.datamodules.client_datasets import wants_clients
from lightning_fl.datamodules.datasets.digits import DigitsDataModule


class DigitsSiloDataModule(DigitsDataModule):
    """The digits of :class:`DigitsDataModule`, dealt out to silos: a federated run has one silo per rank.

    A silo trains and validates on its own digits only; no two silos share one. Any strategy that is not federated gets
    the digits of all silos, which is the centralised baseline.

    Args:
        shares: For each silo how many digits it owns, relative to the others.
        silo: The silo that this process is. None: its rank.
        batch_size: Examples in a batch.
        test_share: Share of the examples kept for testing, in (0, 1).
        seed: Seed of the split, the same in all silos.
        num_workers: Worker processes of each loader.

    Raises:
        ValueError: If a share is not positive, ``silo`` has none, or ``test_share`` is out of range; on setup, if there
            are not as many ranks as shares.
        ImportError: On setup, if scikit-learn is not installed.
    """

    def __init__(
        self,
        shares: Sequence[float] = (1, 1, 3),
        silo: int | None = None,
        batch_size: int = 32,
        test_share: float = 0.2,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, test_share, seed, num_workers)
        if not shares or min(shares) <= 0:
            raise ValueError(f"shares={list(shares)} must hold a positive number for each silo, such as [1, 1, 3].")
        if silo is not None and silo not in range(len(shares)):
            raise ValueError(f"silo={silo} does not fit shares={list(shares)}: expected 0 to {len(shares) - 1}.")
        self.shares = shares
        self.silo = silo

    def read(self) -> tuple[Dataset, Dataset]:
        """Reads the digits and keeps the silo's own."""
        train, test = super().read()
        if not wants_clients(self.trainer):
            return train, test
        silo = self._rank() if self.silo is None else self.silo
        return self._part(train, silo), self._part(test, silo)

    def _rank(self) -> int:
        strategy: Any = None if self.trainer is None else self.trainer.strategy
        group = LocalGroup() if strategy is None else strategy.federation
        if group.size != len(self.shares):
            raise ValueError(
                f"shares={list(self.shares)} name {len(self.shares)} silos, but the federation has {group.size} "
                f"rank(s). Start one process per silo, torchrun --nproc_per_node {len(self.shares)} -m lightning_fl "
                "fit ..., or say with `silo` which one this process is."
            )
        return group.rank

    def _part(self, dataset: Dataset, silo: int) -> TensorDataset:
        assert isinstance(dataset, TensorDataset)
        order = np.random.default_rng(self.seed).permutation(len(dataset))
        ends = np.round(len(dataset) * np.cumsum(self.shares) / sum(self.shares)).astype(int)
        return TensorDataset(*dataset[np.split(order, ends[:-1])[silo]])
