"""The handwritten digits of scikit-learn: real data without a download."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, TensorDataset

from lightning_fl.datamodules.central import CentralDataModule
from lightning_fl.datamodules.datasets.sklearn_data import check_test_share, load, stratified_split


class DigitsDataModule(CentralDataModule):
    """The 1,797 handwritten digits of scikit-learn, with a stratified split into training and test data.

    Images are float32 in [0, 1] of shape ``[1, 8, 8]``, labels int64 in 0 to 9.

    Args:
        batch_size: Examples per training batch.
        test_share: Fraction of the examples held out for testing, in (0, 1).
        **kwargs: ``val_share``, ``seed``, ``num_workers`` and ``eval_batch_size``; see :class:`CentralDataModule`.

    Raises:
        ValueError: If an argument is out of range.
        ImportError: On setup, if scikit-learn is not installed.
    """

    def __init__(self, batch_size: int = 32, test_share: float = 0.2, **kwargs: Any) -> None:
        super().__init__(batch_size=batch_size, **kwargs)
        self.test_share = check_test_share(test_share)

    def read(self) -> tuple[Dataset, Dataset]:
        """Reads and splits the digits."""
        pixels, labels = load("load_digits", "DigitsDataModule")
        x = torch.from_numpy((pixels / 16).astype(np.float32)).reshape(-1, 1, 8, 8)
        y = torch.from_numpy(labels.astype(np.int64))
        train, test = stratified_split(labels, self.test_share, self.seed)
        return TensorDataset(x[train], y[train]), TensorDataset(x[test], y[test])
