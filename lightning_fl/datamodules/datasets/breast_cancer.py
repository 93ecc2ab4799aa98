"""The breast cancer table that comes with scikit-learn: real data without a download."""

from __future__ import annotations

import torch
from torch.utils.data import Dataset, TensorDataset

from lightning_fl.datamodules.base import CentralDataModule
from lightning_fl.datamodules.datasets.sklearn_data import check_test_share, load, stratified_split


class BreastCancerDataModule(CentralDataModule):
    """The 569 tumours of the Wisconsin breast cancer table: 30 standardised features, malignant (0) or benign (1).

    Args:
        batch_size: Examples in a training batch.
        test_share: Share of the examples kept for testing, in (0, 1).
        val_share: Share of the training data kept for validation, in [0, 1). 0: validation uses the test data.
        seed: Seed of the splits.
        num_workers: Worker processes of each loader.

    Raises:
        ValueError: If a share is out of range.
        ImportError: On setup, if scikit-learn is not installed.
    """

    def __init__(
        self,
        batch_size: int = 32,
        test_share: float = 0.2,
        val_share: float = 0.0,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, val_share=val_share, seed=seed, num_workers=num_workers)
        self.test_share = check_test_share(test_share)

    def read(self) -> tuple[Dataset, Dataset]:
        """Training and test data."""
        features, labels = load("load_breast_cancer", type(self).__name__)
        train, test = stratified_split(labels, self.test_share, self.seed)
        mean, std = features[train].mean(axis=0), features[train].std(axis=0)
        x, y = torch.from_numpy((features - mean) / std).float(), torch.from_numpy(labels).long()
        return TensorDataset(x[train], y[train]), TensorDataset(x[test], y[test])
