"""Image data sets that come as files: where they are found, and how they are downloaded when asked."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal

from torch import Tensor
from torch.utils.data import Dataset

from lightning_fl.datamodules.base import CentralDataModule, ImageDataset, Transform, pixel_statistics
from lightning_fl.datamodules.download import RemoteFile, download

Scaling = Literal["unit", "channel", "pixel"]


class ImageFilesDataModule(CentralDataModule):
    """Images with class labels that come as files: training and test data.

    The files are looked for in ``root``; without one in ``$LIGHTNING_FL_DATA/NAME``, in ``data/NAME`` and, for some
    sets, where a package of the system puts them. They are downloaded only with ``download=True``.

    Args:
        root: Folder with the files. None: the first of the usual folders that has them.
        download: Whether to download the files if they are missing.
        scaling: ``"unit"``: pixels in [0, 1]. ``"channel"``: mean 0 and variance 1 in each channel of the training
            data. ``"pixel"``: the same at each place of the image.
        batch_size: Examples in a training batch.
        val_share: Share of the training data kept for validation, in [0, 1). 0: validation uses the test data.
        transform: Applied to each float image of the training data, such as an augmentation.
        seed: Seed of the validation split.
        num_workers: Worker processes of each loader.
        eval_batch_size: Examples in a batch of validation, test and prediction. None: the larger of ``batch_size`` and
            256.

    Raises:
        ValueError: If an argument is out of range; on setup, if a file is corrupt or cut short.
        FileNotFoundError: On setup, if the files are not there.
        DownloadError: If the download fails; see :func:`download`.
    """

    title: ClassVar[str]
    """Name of the data set in messages."""
    folders: ClassVar[Sequence[str]]
    """Names of its folder in ``$LIGHTNING_FL_DATA`` and ``data``; downloads go into the first."""
    system_folder: ClassVar[str | None] = None
    """Where a package of the system puts the files."""
    files: ClassVar[Sequence[RemoteFile]]
    """What to download."""
    num_classes: ClassVar[int]

    def __init__(
        self,
        root: str | Path | None = None,
        download: bool = False,
        scaling: Scaling = "unit",
        batch_size: int = 32,
        val_share: float = 0.0,
        transform: Transform | None = None,
        seed: int = 0,
        num_workers: int = 0,
        eval_batch_size: int | None = None,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            val_share=val_share,
            seed=seed,
            num_workers=num_workers,
            eval_batch_size=eval_batch_size,
        )
        self.root = root
        self.download = download
        self.scaling = scaling
        self.transform = transform

    @abstractmethod
    def has_files(self, folder: Path) -> bool:
        """Whether a folder has the data set."""

    @abstractmethod
    def read_files(self, folder: Path) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Training and test data: images, uint8 ``[num_samples, channels, height, width]``, and labels, int64."""

    def prepare_data(self) -> None:
        """Downloads the files if they are missing and ``download`` is set."""
        if self.download and self._find() is None:
            download(self.title, self.files, self._candidates()[0])

    def read(self) -> tuple[Dataset, Dataset]:
        """Training and test data."""
        folder = self._find()
        if folder is None:
            size = sum(file.size for file in self.files) / 1e6
            places = ", ".join(map(str, self._candidates()))
            raise FileNotFoundError(
                f"{self.title} was not found in {places}. Say with `root` where its files are, or download {size:.1f} "
                "MB with download=True."
            )
        train, test = self.read_files(folder)
        for part, (images, labels) in (("training", train), ("test", test)):
            check_labels(f"the {part} data of {self.title} in {folder}", images, labels, self.num_classes)
        mean, std = pixel_statistics(train[0], self.scaling)
        return ImageDataset(*train, mean, std, self.transform), ImageDataset(*test, mean, std)

    def _candidates(self) -> list[Path]:
        if self.root is not None:
            return [Path(self.root)]
        own = os.environ.get("LIGHTNING_FL_DATA")
        parents = [*([Path(own)] if own else []), Path("data")]
        system = [Path(self.system_folder)] if self.system_folder else []
        return [parent / name for parent in parents for name in self.folders] + system

    def _find(self) -> Path | None:
        return next(filter(self.has_files, self._candidates()), None)


def check_labels(name: str, images: Tensor, labels: Tensor, num_classes: int) -> None:
    """Refuses images and labels that don't fit each other.

    Raises:
        ValueError: If their numbers differ, there are none, or a label is out of range.
    """
    if len(images) != len(labels) or len(labels) == 0:
        raise ValueError(f"{name} has {len(images)} images and {len(labels)} labels; expected equally many.")
    if not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise ValueError(
            f"{name} has labels from {int(labels.min())} to {int(labels.max())}; expected 0 to {num_classes - 1}."
        )
