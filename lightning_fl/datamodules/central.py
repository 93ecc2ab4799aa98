"""Base class for data sets in one place: loaders for training, validation and test."""

from __future__ import annotations

from abc import abstractmethod

import lightning as L
import numpy as np
from torch.utils.data import DataLoader, Dataset, Subset


class CentralDataModule(L.LightningDataModule):
    """A data set in one place, with training and test data.

    A federated strategy splits the training data among simulated clients, by its ``partition`` argument or by a
    ``PartitionedDataModule`` around this datamodule; any other strategy trains on all of it. Validation uses the test
    data unless ``val_share`` is set; prediction always uses the test data. Subclasses override :meth:`read`.

    Args:
        batch_size: Examples per training batch.
        val_share: Fraction of the training data held out for validation, in [0, 1). 0: validate on the test data.
        seed: Seed of the data set's splits.
        num_workers: Worker processes per loader.
        eval_batch_size: Examples per batch in validation, test and prediction. None: the larger of ``batch_size`` and
            256.
        public_share: Fraction of the training data that no client trains on, in [0, 1): public data for the server, as
            for :class:`~lightning_fl.callbacks.EnsembleDistillation`.

    Raises:
        ValueError: If an argument is out of range.
    """

    train_set: Dataset
    val_set: Dataset
    test_set: Dataset
    public_set: Dataset

    def __init__(
        self,
        *,
        batch_size: int = 32,
        val_share: float = 0.0,
        seed: int = 0,
        num_workers: int = 0,
        eval_batch_size: int | None = None,
        public_share: float = 0.0,
    ) -> None:
        super().__init__()
        self.eval_batch_size = check_batch_sizes(batch_size, eval_batch_size)
        if not 0 <= val_share < 1:
            raise ValueError(f"val_share={val_share} must be at least 0 and less than 1; 0 validates on the test data.")
        if not 0 <= public_share < 1:
            raise ValueError(f"public_share={public_share} must be at least 0 and less than 1.")
        self.public_share = public_share
        self.batch_size = batch_size
        self.val_share = val_share
        self.seed = seed
        self.num_workers = num_workers
        self._is_read = False

    @abstractmethod
    def read(self) -> tuple[Dataset, Dataset]:
        """The training and test data, map-style."""

    def setup(self, stage: str | None = None) -> None:
        """Reads the data, once."""
        # Lightning calls this for each stage, and again for each fit.
        if self._is_read:
            return
        train, test = self.read()
        self.train_set, self.val_set, self.test_set = train, test, test
        if self.val_share > 0:
            order = np.random.default_rng(self.seed).permutation(len(train))  # type: ignore[arg-type]
            # At least one sample on each side: a loader without samples would silently skip training or validation.
            num_val = min(max(round(len(order) * self.val_share), 1), len(order) - 1)
            self.train_set = Subset(train, np.sort(order[num_val:]).tolist())
            self.val_set = Subset(train, np.sort(order[:num_val]).tolist())
        if self.public_share > 0:
            train = self.train_set
            order = np.random.default_rng([self.seed, 1]).permutation(len(train))  # type: ignore[arg-type]
            num_public = min(max(round(len(order) * self.public_share), 1), len(order) - 1)
            self.train_set = Subset(train, np.sort(order[num_public:]).tolist())
            self.public_set = Subset(train, np.sort(order[:num_public]).tolist())
        self._is_read = True

    def train_dataloader(self) -> DataLoader:
        """Shuffled training data."""
        return self._loader(self.train_set, shuffle=True)

    def val_dataloader(self) -> DataLoader:
        """Validation data."""
        return self._loader(self.val_set)

    def test_dataloader(self) -> DataLoader:
        """Test data."""
        return self._loader(self.test_set)

    def public_dataloader(self) -> DataLoader:
        """The public data, on which no client trains.

        Raises:
            ValueError: If ``public_share`` is 0.
        """
        if not self.public_share:
            raise ValueError(f"{type(self).__name__} has no public data. Set public_share, for example to 0.2.")
        return self._loader(self.public_set)

    def predict_dataloader(self) -> DataLoader:
        """Test data."""
        return self._loader(self.test_set)

    def _loader(self, dataset: Dataset, shuffle: bool = False) -> DataLoader:
        size = self.batch_size if shuffle else self.eval_batch_size
        return DataLoader(dataset, batch_size=size, shuffle=shuffle, num_workers=self.num_workers)


def check_batch_sizes(batch_size: int, eval_batch_size: int | None) -> int:
    """The batch size for evaluation, by default the larger of ``batch_size`` and 256.

    Raises:
        ValueError: If a batch size is less than 1.
    """
    if batch_size < 1 or (eval_batch_size is not None and eval_batch_size < 1):
        raise ValueError(f"batch_size={batch_size} and eval_batch_size={eval_batch_size} must be at least 1.")
    return max(batch_size, 256) if eval_batch_size is None else eval_batch_size
