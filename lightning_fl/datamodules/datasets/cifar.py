"""CIFAR-10 and CIFAR-100 in their binary version, which needs no pickle."""

from __future__ import annotations

import gzip
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from lightning_fl.datamodules.download import RemoteFile
from lightning_fl.datamodules.image_files import ImageFilesDataModule

_PIXELS = 3 * 32 * 32


class CIFAR10DataModule(ImageFilesDataModule):
    """CIFAR-10: 50,000 + 10,000 photos, float32 images of shape ``[3, 32, 32]``, labels 0 to 9.

    The data is read from ``cifar-10-binary.tar.gz``, 170 MB, or from the folder ``cifar-10-batches-bin`` unpacked from
    it. Without ``root`` both are looked for in ``$LIGHTNING_FL_DATA/cifar10`` and ``data/cifar10``.

    Args:
        root: Folder with the files. None: the first of the default folders that has them.
        download: Whether to download the files if they are missing.
        scaling: ``"unit"``: pixels in [0, 1]. ``"channel"``: mean 0 and variance 1 per channel of the training data.
            ``"pixel"``: mean 0 and variance 1 per pixel of the training data.
        transform: Applied to each float32 image of the training data, such as an augmentation.
        **kwargs: ``batch_size``, ``val_share``, ``seed``, ``num_workers`` and ``eval_batch_size``; see
            :class:`CentralDataModule`.

    Raises:
        ValueError: If an argument is out of range; on setup, if a file is corrupt or truncated.
        FileNotFoundError: On setup, if the file is missing.

    References:
        Krizhevsky, *Learning Multiple Layers of Features from Tiny Images*, 2009.
    """

    title = "CIFAR-10"
    folders = ("cifar10",)
    num_classes = 10
    files = (
        RemoteFile(
            "cifar-10-binary.tar.gz",
            "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
            170_052_171,
            "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        ),
    )
    unpacked_folder: ClassVar[str] = "cifar-10-batches-bin"
    parts: ClassVar[tuple[Sequence[str], Sequence[str]]] = (
        [f"data_batch_{i}.bin" for i in range(1, 6)],
        ["test_batch.bin"],
    )
    label_bytes: ClassVar[int] = 1

    def has_files(self, folder: Path) -> bool:
        """Whether a folder has the archive or all of its files."""
        return (folder / self.files[0].name).exists() or self._unpacked(folder) is not None

    def read_files(self, folder: Path) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """See :meth:`ImageFilesDataModule.read_files`."""
        names = [name for part in self.parts for name in part]
        unpacked = self._unpacked(folder)
        if unpacked is not None:
            contents = {name: (unpacked / name).read_bytes() for name in names}
        else:
            contents = _members(folder / self.files[0].name, names)
        train, test = (self._records(part, contents) for part in self.parts)
        return train, test

    def _unpacked(self, folder: Path) -> Path | None:
        names = [name for part in self.parts for name in part]
        places = (folder, folder / self.unpacked_folder)
        return next((place for place in places if all((place / name).exists() for name in names)), None)

    def _records(self, names: Sequence[str], contents: dict[str, bytes]) -> tuple[Tensor, Tensor]:
        size = self.label_bytes + _PIXELS
        for name in names:
            if len(contents[name]) % size or not contents[name]:
                raise ValueError(
                    f"{name} of {self.title} has {len(contents[name])} bytes, expected a multiple of the record "
                    f"size {size}; it is corrupt or truncated. Delete it and download it again."
                )
        records = np.concatenate([np.frombuffer(contents[name], dtype=np.uint8).reshape(-1, size) for name in names])
        images = torch.from_numpy(records[:, self.label_bytes :].reshape(-1, 3, 32, 32))
        # CIFAR-100 has a coarse label before the fine one: the label is always the last byte before the pixels
        return images, torch.from_numpy(records[:, self.label_bytes - 1].astype(np.int64))


class CIFAR100DataModule(CIFAR10DataModule):
    """CIFAR-100: 50,000 + 10,000 photos, float32 images of shape ``[3, 32, 32]``, fine labels 0 to 99.

    The arguments are those of :class:`CIFAR10DataModule`. The data is read from ``cifar-100-binary.tar.gz``, 169 MB, or
    from the folder ``cifar-100-binary`` unpacked from it. Without ``root`` both are looked for in
    ``$LIGHTNING_FL_DATA/cifar100`` and ``data/cifar100``.

    References:
        Krizhevsky, *Learning Multiple Layers of Features from Tiny Images*, 2009.
    """

    title = "CIFAR-100"
    folders = ("cifar100",)
    num_classes = 100
    files = (
        RemoteFile(
            "cifar-100-binary.tar.gz",
            "https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
            168_513_733,
            "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
        ),
    )
    unpacked_folder = "cifar-100-binary"
    parts = (["train.bin"], ["test.bin"])
    label_bytes = 2


def _members(archive: Path, names: Sequence[str]) -> dict[str, bytes]:
    """The contents of some files in an archive, by file name without folders; nothing is unpacked to disk."""
    contents: dict[str, bytes] = {}
    try:
        with gzip.open(archive) as unzipped, tarfile.open(fileobj=unzipped, mode="r|") as tar:
            for member in tar:
                name = member.name.rpartition("/")[2]
                # Not unpacked to disk: a path in an archive may point outside of the folder.
                stream = tar.extractfile(member) if member.isfile() and name in names else None
                if stream is not None:
                    contents[name] = stream.read()
            # `tarfile` stops before the checksum, which gzip compares at the end of the file.
            while unzipped.read(1 << 20):
                pass
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{archive} is corrupt or truncated ({error}). Delete it and download it again.") from error
    missing = [name for name in names if name not in contents]
    if missing:
        raise ValueError(f"{archive} does not contain {', '.join(missing)}. Delete it and download it again.")
    return contents
