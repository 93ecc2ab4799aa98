"""Image data sets in files: finding, downloading and holding them in memory."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_fl.datamodules.central import CentralDataModule
from lightning_fl.datamodules.download import RemoteFile, download

Transform = Callable[[Tensor], Any]
Scaling = Literal["unit", "channel", "pixel"]


class ImageFilesDataModule(CentralDataModule):
    """Labelled images in files, as training and test data.

    Without ``root`` the files are looked for in ``$LIGHTNING_FL_DATA/NAME``, ``data/NAME`` and, for some data sets,
    the folder of a system package. They are downloaded only with ``download=True``.

    Args:
        root: Folder with the files. None: the first of the default folders that has them.
        download: Whether to download the files if they are missing.
        scaling: ``"unit"``: pixels in [0, 1]. ``"channel"``: mean 0 and variance 1 per channel of the training data.
            ``"pixel"``: mean 0 and variance 1 per pixel of the training data. Differential privacy refuses both.
        transform: Applied to each float32 image of the training data, such as an augmentation.
        **kwargs: ``batch_size``, ``val_share``, ``seed``, ``num_workers`` and ``eval_batch_size``; see
            :class:`CentralDataModule`.

    Raises:
        ValueError: If an argument is out of range; on setup, if a file is corrupt or truncated.
        FileNotFoundError: On setup, if the files are missing.
        DownloadError: If the download fails.
        ImportError: If files must be downloaded and pooch is not installed.
    """

    title: ClassVar[str]
    """Name of the data set, for messages."""
    folders: ClassVar[Sequence[str]]
    """Its folders within ``$LIGHTNING_FL_DATA`` and ``data``; downloads go into the first."""
    system_folder: ClassVar[str | None] = None
    """The folder in which a system package installs the files."""
    files: ClassVar[Sequence[RemoteFile]]
    """The files to download."""
    num_classes: ClassVar[int]

    def __init__(
        self,
        root: str | Path | None = None,
        download: bool = False,
        scaling: Scaling = "unit",
        *,
        transform: Transform | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.root = root
        self.download = download
        self.scaling = scaling
        self.transform = transform

    @property
    def learned_from_data(self) -> str:
        """What the scaling learned from the training data without noise, and what to do under differential privacy."""
        if self.scaling == "unit":
            return ""
        return f"the mean and deviation of its pixels (scaling={self.scaling!r}). Use scaling='unit'."

    @abstractmethod
    def has_files(self, folder: Path) -> bool:
        """Whether a folder has the data set."""

    @abstractmethod
    def read_files(self, folder: Path) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Training and test data: uint8 images ``[num_samples, channels, height, width]``, and int64 labels."""

    def prepare_data(self) -> None:
        """Downloads the files if they are missing and ``download`` is set."""
        # Here and not in `setup`, because Lightning calls this in one process per machine only.
        if self.download and self._find() is None:
            download(self.title, self.files, self._candidates()[0])

    def read(self) -> tuple[Dataset, Dataset]:
        """Training and test data."""
        folder = self._find()
        if folder is None:
            size = sum(file.size for file in self.files) / 1e6
            places = ", ".join(map(str, self._candidates()))
            raise FileNotFoundError(
                f"{self.title} was not found in {places}. Set `root` to the folder with its files, or download "
                f"{size:.1f} MB with download=True."
            )
        train, test = self.read_files(folder)
        for part, (images, labels) in (("training", train), ("test", test)):
            check_labels(f"the {part} data of {self.title} in {folder}", images, labels, self.num_classes)
        shape, test_shape = (list(images.shape[1:]) for images, _ in (train, test))
        if shape != test_shape:
            raise ValueError(
                f"The training images of {self.title} in {folder} have the shape {shape} and the test images "
                f"{test_shape}; expected the same. Download the files again."
            )
        mean, std = pixel_statistics(train[0], self.scaling)
        return ImageDataset(*train, mean, std, self.transform), ImageDataset(*test, mean, std)

    def _candidates(self) -> list[Path]:
        if self.root is not None:
            return [Path(self.root)]
        data_root = os.environ.get("LIGHTNING_FL_DATA")
        parents = [*([Path(data_root)] if data_root else []), Path("data")]
        system = [Path(self.system_folder)] if self.system_folder else []
        return [parent / name for parent in parents for name in self.folders] + system

    def _find(self) -> Path | None:
        return next(filter(self.has_files, self._candidates()), None)


class ImageDataset(Dataset):
    """Images held in memory as bytes and converted to float32 when they are read.

    It is also a :class:`~lightning_fl.data.lazy_batches.RowSource`.

    Args:
        images: uint8 of shape ``[num_samples, channels, height, width]``.
        targets: Class labels, int64 of shape ``[num_samples]``.
        mean: Subtracted from the pixels, in 0 to 255; broadcasts to ``[channels, height, width]``.
        std: Divides the result, in the same unit and shape.
        transform: Applied to each float32 image, such as an augmentation.
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
        """The samples of a batch, converted together."""
        images, targets = self.gather(np.asarray(indices))
        xs: Any = images.unbind() if self.transform is None else map(self.transform, images)
        return list(zip(xs, targets.unbind(), strict=True))

    def gather(self, indices: np.ndarray) -> list[Tensor]:
        """Images and targets as one batch, without the transform."""
        if self.images.device.type != "cpu":
            rows = torch.as_tensor(indices, dtype=torch.int64).to(self.images.device)
            return [(self.images[rows].float() - self.mean) / self.std, self.targets[rows]]
        # NumPy, because torch would start threads, which takes longer than the arithmetic of one batch
        pixels = self.images.numpy()[indices].astype(np.float32)
        return [torch.from_numpy((pixels - self.mean.numpy()) / self.std.numpy()), self.targets[indices]]

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The tensors that hold the images, the targets, and the mean and deviation that convert pixels."""
        return self.images, self.targets, self.mean, self.std

    def to(self, device: torch.device) -> ImageDataset:
        """The same images, still as bytes, on another device."""
        images, targets, mean, std = (tensor.to(device) for tensor in self.tensors)
        return ImageDataset(images, targets, mean, std, self.transform)

    @property
    def row_spec(self) -> Any:
        """Shape and dtype of an image and a target; None with a transform, which may be random or change the shape."""
        if self.transform is not None:
            return None
        return (self.images.shape[1:], torch.float32), (self.targets.shape[1:], self.targets.dtype)

    @property
    def source_id(self) -> int:
        """Equal for the same data set."""
        return id(self)


def pixel_statistics(images: Tensor, scaling: str) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation by which pixels are scaled.

    Args:
        images: uint8 of shape ``[num_samples, channels, height, width]``, the training data.
        scaling: ``"unit"``: to [0, 1]. ``"channel"``: to mean 0 and variance 1 per channel. ``"pixel"``: to mean 0 and
            variance 1 per pixel, with 0.001 added to the standard deviation, which is 0 where all images are black.

    Raises:
        ValueError: If the scaling is unknown.
    """
    if scaling == "unit":
        return torch.zeros(()), torch.full((), 255.0)
    if scaling not in ("channel", "pixel"):
        raise ValueError(f"scaling={scaling!r} is unknown; expected 'unit', 'channel' or 'pixel'.")
    axes = (0, 2, 3) if scaling == "channel" else (0,)
    # in pieces, because the training data in float64 can take gigabytes
    total, squares = torch.zeros(()), torch.zeros(())
    for piece in images.split(2000):
        values = piece.double()
        total = total + values.sum(axes, keepdim=True)
        squares = squares + (values**2).sum(axes, keepdim=True)
    count = images.numel() / total.numel()
    mean = total / count
    # Rounding can make the difference negative for a pixel that is the same in all images.
    std = (squares / count - mean**2).clamp(min=0).sqrt() + (1e-3 if scaling == "pixel" else 0)
    return mean[0].float(), std[0].clamp(min=1e-6).float()


def check_labels(name: str, images: Tensor, labels: Tensor, num_classes: int) -> None:
    """Checks that images and labels match.

    Raises:
        ValueError: If their numbers differ, there are none, or a label is out of range.
    """
    if len(images) != len(labels) or len(labels) == 0:
        raise ValueError(
            f"{name} has {len(images)} images and {len(labels)} labels; expected the same number, at least 1."
        )
    if not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise ValueError(
            f"{name} has labels from {int(labels.min())} to {int(labels.max())}; expected 0 to {num_classes - 1}."
        )
