"""Handwritten digits that come with scikit-learn: real data without a download."""

from __future__ import annotations

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader, TensorDataset


class DigitsDataModule(L.LightningDataModule):
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
        super().__init__()
        if not 0 < test_share < 1:
            raise ValueError(f"test_share={test_share} must lie between 0 and 1; 0.2 keeps a fifth for testing.")
        self.batch_size = batch_size
        self.test_share = test_share
        self.seed = seed
        self.num_workers = num_workers

    def setup(self, stage: str | None = None) -> None:
        """Reads and splits the digits."""
        try:
            from sklearn.datasets import load_digits
            from sklearn.model_selection import train_test_split
        except ImportError as error:
            raise ImportError(
                'DigitsDataModule needs scikit-learn, which is not installed: pip install "lightning-fl[data]"'
            ) from error
        pixels, labels = load_digits(return_X_y=True)
        x = torch.from_numpy((pixels / 16).astype(np.float32)).reshape(-1, 1, 8, 8)
        y = torch.from_numpy(labels.astype(np.int64))
        train, test = train_test_split(
            np.arange(len(labels)), test_size=self.test_share, stratify=labels, random_state=self.seed
        )
        self.train_set = TensorDataset(x[train], y[train])
        self.test_set = TensorDataset(x[test], y[test])

    def train_dataloader(self) -> DataLoader:
        """Shuffled training data."""
        return self._loader(self.train_set, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        """Test data."""
        return self._loader(self.test_set)

    def test_dataloader(self) -> DataLoader:
        """Test data."""
        return self._loader(self.test_set)

    def predict_dataloader(self) -> DataLoader:
        """Test data."""
        return self._loader(self.test_set)

    def _loader(self, dataset: TensorDataset, shuffle: bool = False) -> DataLoader:
        return DataLoader(dataset, batch_size=self.batch_size, shuffle=shuffle, num_workers=self.num_workers)
