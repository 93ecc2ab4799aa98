"""The breast cancer table of scikit-learn: real data without a download."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import Dataset, TensorDataset

from lightning_fl.datamodules.central import CentralDataModule
from lightning_fl.datamodules.datasets.sklearn_data import check_test_share, load, stratified_split


class BreastCancerDataModule(CentralDataModule):
    """The Wisconsin breast cancer table: 569 tumours, 30 standardised features, labels malignant (0) and benign (1).

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

    learned_from_data = (
        "the mean and deviation of its features. Use TabularDataModule with a schema of public knowledge."
    )

    def read(self) -> tuple[Dataset, Dataset]:
        """Training and test data."""
        features, labels = load("load_breast_cancer", type(self).__name__)
        train, test = stratified_split(labels, self.test_share, self.seed)
        # From the training rows only, or the test data would leak into the features.
        mean, std = features[train].mean(axis=0), features[train].std(axis=0)
        x, y = torch.from_numpy((features - mean) / std).float(), torch.from_numpy(labels).long()
        return TensorDataset(x[train], y[train]), TensorDataset(x[test], y[test])
