"""What data sets in one place have in common: loaders for training, validation and test."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

Transform = Callable[[Tensor], Any]


class CentralDataModule(L.LightningDataModule):
    """A data set in one place: training and test data.

    A federated strategy splits the training loader among clients, in the way that it says itself or a
    ``PartitionedDataModule`` around this one; any other strategy trains on all of it. Subclasses override :meth:`read`.
    Validation uses the test data unless ``val_share`` keeps a part of the training data for it; prediction uses the
    test data.

    Args:
        batch_size: Examples in a training batch.
        val_share: Share of the training data kept for validation, in [0, 1).
        seed: Seed of every split.
        num_workers: Worker processes of each loader.
        eval_batch_size: Examples in a batch of validation, test and prediction. None: the larger of ``batch_size`` and
            256.

    Raises:
        ValueError: If an argument is out of range.
    """

    train_set: Dataset
    val_set: Dataset
    test_set: Dataset

    def __init__(
        self,
        *,
        batch_size: int = 32,
        val_share: float = 0.0,
        seed: int = 0,
        num_workers: int = 0,
        eval_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        self.eval_batch_size = check_batch_sizes(batch_size, eval_batch_size)
        if not 0 <= val_share < 1:
            raise ValueError(f"val_share={val_share} must be at least 0 and below 1; 0 validates on the test data.")
        self.batch_size = batch_size
        self.val_share = val_share
        self.seed = seed
        self.num_workers = num_workers
        self._is_read = False

    @abstractmethod
    def read(self) -> tuple[Dataset, Dataset]:
        """The training and the test data, map-style."""

    def setup(self, stage: str | None = None) -> None:
        """Reads the data, once."""
        if self._is_read:
            return
        train, test = self.read()
        self.train_set, self.val_set, self.test_set = train, test, test
        if self.val_share > 0:
            order = np.random.default_rng(self.seed).permutation(len(train))  # type: ignore[arg-type]
            kept, held = _cut(order, self.val_share)
            self.train_set, self.val_set = Subset(train, kept.tolist()), Subset(train, held.tolist())
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

    def predict_dataloader(self) -> DataLoader:
        """Test data."""
        return self._loader(self.test_set)

    def _loader(self, dataset: Dataset, shuffle: bool = False) -> DataLoader:
        size = self.batch_size if shuffle else self.eval_batch_size
        return DataLoader(dataset, batch_size=size, shuffle=shuffle, num_workers=self.num_workers)


def check_batch_sizes(batch_size: int, eval_batch_size: int | None) -> int:
    """The batch size of evaluation, by default the larger of the training's and 256.

    Raises:
        ValueError: If one is below 1.
    """
    if batch_size < 1 or (eval_batch_size is not None and eval_batch_size < 1):
        raise ValueError(f"batch_size={batch_size} and eval_batch_size={eval_batch_size} must be at least 1.")
    return max(batch_size, 256) if eval_batch_size is None else eval_batch_size


def _cut(order: np.ndarray, val_share: float) -> tuple[np.ndarray, np.ndarray]:
    num_val = min(max(round(len(order) * val_share), 1), len(order) - 1)
    return np.sort(order[num_val:]), np.sort(order[:num_val])


class ImageDataset(Dataset):
    """Images kept as bytes in memory; each becomes a float32 tensor when it is read.

    Args:
        images: uint8 of shape ``[num_samples, channels, height, width]``.
        targets: Class labels, int64 of shape ``[num_samples]``.
        mean: Subtracted from the pixels in 0 to 255; broadcasts to ``[channels, height, width]``.
        std: Divides the result; broadcasts likewise.
        transform: Applied to each float image, such as an augmentation.
    """

    def __init__(
        self, images: Tensor, targets: Tensor, mean: Tensor, std: Tensor, transform: Transform | None = None
    ) -> None:
        self.images = images
        self.targets = targets
        self.mean = mean
        self.std = std
        self.transform = transform

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[tuple[Any, Tensor]]:
        """The samples of a batch, converted together; by NumPy, since torch would start threads for so little."""
        images, targets = self.gather(np.asarray(indices))
        xs: Any = images.unbind() if self.transform is None else map(self.transform, images)
        return list(zip(xs, targets.unbind(), strict=True))

    def gather(self, indices: np.ndarray) -> list[Tensor]:
        """Images and targets as one batch, without the transform."""
        pixels = self.images.numpy()[indices].astype(np.float32)
        return [torch.from_numpy((pixels - self.mean.numpy()) / self.std.numpy()), self.targets[indices]]

    @property
    def row_spec(self) -> Any:
        """Shape and dtype of an image and a target; None if a transform may change them."""
        if self.transform is not None:
            return None
        return (self.images.shape[1:], torch.float32), (self.targets.shape[1:], self.targets.dtype)

    @property
    def source_id(self) -> int:
        """The same for the same images."""
        return id(self)


def pixel_statistics(images: Tensor, scaling: str) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation that scale pixels.

    Args:
        images: uint8 of shape ``[num_samples, channels, height, width]``, the training data.
        scaling: ``"unit"``: to [0, 1]. ``"channel"``: to mean 0 and variance 1 in each channel. ``"pixel"``: the same
            at each place of the image (with 0.001 added to the deviation, which is 0 where no image has ink).

    Raises:
        ValueError: If the scaling is unknown.
    """
    if scaling == "unit":
        return torch.zeros(()), torch.full((), 255.0)
    if scaling not in ("channel", "pixel"):
        raise ValueError(f"scaling={scaling!r} is unknown; expected 'unit', 'channel' or 'pixel'.")
    axes = (0, 2, 3) if scaling == "channel" else (0,)
    total, squares = torch.zeros(()), torch.zeros(())
    for piece in images.split(2000):
        values = piece.double()
        total = total + values.sum(axes, keepdim=True)
        squares = squares + (values**2).sum(axes, keepdim=True)
    number = images.numel() / total.numel()
    mean = total / number
    std = (squares / number - mean**2).clamp(min=0).sqrt() + (1e-3 if scaling == "pixel" else 0)
    return mean[0].float(), std[0].clamp(min=1e-6).float()
