"""Handwritten digits divided among silos; each process holds only its silo's digits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset, TensorDataset

from lightning_fl.communication import LocalGroup
from lightning_fl.datamodules.datasets.digits import DigitsDataModule
from lightning_fl.datamodules.loader_hooks import wants_client_loaders


class DigitsSiloDataModule(DigitsDataModule):
    """The digits of :class:`DigitsDataModule`, divided among silos: a federated run has one silo per rank.

    Each silo trains and validates on its own digits; no two silos share a digit. A strategy that is not federated gets
    the digits of all silos, which is the centralised baseline.

    Args:
        shares: Relative size of each silo's data set.
        silo: Index of the silo that this process represents. None: its rank.
        **kwargs: The arguments of :class:`DigitsDataModule`; ``seed`` must be the same in all silos.

    Raises:
        ValueError: If an argument is out of range; on setup, if the number of ranks is not that of the shares.
        ImportError: On setup, if scikit-learn is not installed.
    """

    def __init__(
        self,
        shares: Sequence[float] = (1, 1, 3),
        silo: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not shares or min(shares) <= 0:
            raise ValueError(f"shares={list(shares)} must have a positive number for each silo, such as [1, 1, 3].")
        if silo is not None and silo not in range(len(shares)):
            raise ValueError(f"silo={silo} is out of range for shares={list(shares)}: expected 0 to {len(shares) - 1}.")
        self.shares = shares
        self.silo = silo

    def read(self) -> tuple[Dataset, Dataset]:
        """Reads the digits and keeps those of the silo."""
        train, test = super().read()
        if not wants_client_loaders(self.trainer):
            return train, test
        silo = self._rank() if self.silo is None else self.silo
        return self._part(train, silo), self._part(test, silo)

    def _rank(self) -> int:
        strategy: Any = None if self.trainer is None else self.trainer.strategy
        group = LocalGroup() if strategy is None else strategy.federation
        if group.size != len(self.shares):
            raise ValueError(
                f"shares={list(self.shares)} describes {len(self.shares)} silos, but the federation has {group.size} "
                f"rank(s). Start one process per silo, torchrun --nproc_per_node {len(self.shares)} -m lightning_fl "
                "fit ..., or set `silo` to the index of this process's silo."
            )
        return group.rank

    def _part(self, dataset: Dataset, silo: int) -> TensorDataset:
        assert isinstance(dataset, TensorDataset)
        # The same order in every silo's process, so that their parts are disjoint without communication.
        order = np.random.default_rng(self.seed).permutation(len(dataset))
        ends = np.round(len(dataset) * np.cumsum(self.shares) / sum(self.shares)).astype(int)
        return TensorDataset(*dataset[np.split(order, ends[:-1])[silo]])
