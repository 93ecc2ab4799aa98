"""Handwritten digits that come with scikit-learn: real data without a download."""

from __future__ import annotations

import numpy as np
import torch
from torch.utils.data import Dataset, TensorDataset

from lightning_fl.datamodules.base import CentralDataModule
from lightning_fl.datamodules.datasets.sklearn_data import check_test_share, load, stratified_split


class DigitsDataModule(CentralDataModule):
    """The 1,797 handwritten digits of scikit-learn, split by class into training and test data.

    Images are float32 in [0, 1] of shape ``[1, 8, 8]``, labels int64 in 0 to 9. Validation and prediction use the test
    data too.

    Args:
        batch_size: Examples in a batch.
        test_share: Share of the examples kept for testing, in (0, 1).
        seed: Seed of the split.
        num_workers: Worker processes of each loader.

    Raises:
        ValueError: If ``test_share`` is out of range.
        ImportError: On setup, if scikit-learn is not installed.
    """

    def __init__(self, batch_size: int = 32, test_share: float = 0.2, seed: int = 0, num_workers: int = 0) -> None:
        super().__init__(batch_size=batch_size, seed=seed, num_workers=num_workers)
        self.test_share = check_test_share(test_share)

    def read(self) -> tuple[Dataset, Dataset]:
        """Reads and splits the digits."""
        pixels, labels = load("load_digits", "DigitsDataModule")
        x = torch.from_numpy((pixels / 16).astype(np.float32)).reshape(-1, 1, 8, 8)
        y = torch.from_numpy(labels.astype(np.int64))
        train, test = stratified_split(labels, self.test_share, self.seed)
        return TensorDataset(x[train], y[train]), TensorDataset(x[test], y[test])
