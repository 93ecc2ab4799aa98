"""Images in folders: one folder per client, within it one folder per class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_fl.datamodules.image_files import Transform
from lightning_fl.datamodules.natural import ClientData, NaturalDataModule
from lightning_fl.types import ClientId

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")


class ImageFolderDataModule(NaturalDataModule):
    """Images in folders ``root/CLIENT/CLASS/image.png``, read from disk when they are needed.

    Samples are float32 in [0, 1] of shape ``[channels, image_size, image_size]``; classes are numbered in alphabetical
    order. ``num_classes`` and ``classes`` are known after ``setup()``.

    Args:
        root: The folder with one folder per client.
        image_size: Height and width to which images are resized, in pixels.
        channels: 3 for RGB, 1 for greyscale.
        classes: Names of the classes. None: the names of all class folders.
        transform: Applied to each float32 image, such as a normalisation.
        **kwargs: ``batch_size``, ``val_share``, ``test_share``, ``seed``, ``num_workers`` and ``eval_batch_size``; see
            :class:`NaturalDataModule`.

    Raises:
        ValueError: If an argument is out of range; on setup, if a client has no images or an unknown class; when an
            image is read, if it is corrupt.
        FileNotFoundError: On setup, if there are no folders.
        ImportError: On setup, if Pillow is not installed.
    """

    def __init__(
        self,
        root: str | Path,
        image_size: int = 32,
        channels: int = 3,
        classes: Sequence[str] | None = None,
        *,
        transform: Transform | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if image_size < 1 or channels not in (1, 3):
            raise ValueError(f"image_size={image_size} must be at least 1, and channels={channels} must be 1 or 3.")
        self.root, self.image_size, self.channels, self.transform = root, image_size, channels, transform
        self.classes = classes

    @property
    def num_classes(self) -> int:
        """Number of classes, after ``setup()``."""
        assert self.classes is not None
        return len(self.classes)

    def read(self) -> ClientData:
        """Lists the images without opening them."""
        try:
            import PIL.Image  # noqa: F401
        except ImportError as error:
            raise ImportError("ImageFolderDataModule needs Pillow: pip install pillow") from error
        root = Path(self.root)
        clients = sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []
        if not clients:
            raise FileNotFoundError(f"{root} has no folders; expected files such as {root}/CLIENT/CLASS/image.png.")
        found = {client.name: _images(client) for client in clients}
        if self.classes is None:
            self.classes = sorted({name for images in found.values() for name, _ in images})
        for client, images in found.items():
            unknown = sorted({name for name, _ in images} - set(self.classes))
            if unknown or not images:
                fault = f"has images of the unknown classes {', '.join(unknown)}" if unknown else "has no images"
                raise ValueError(f"Client {client!r} of {root} {fault}; expected {root}/{client}/CLASS/image.png.")
        return ClientData(sorted(found), lambda client: len(found[client]), lambda client: self._open(found, client))

    def _open(self, found: dict[str, list[tuple[str, Path]]], client: ClientId) -> Dataset:
        assert self.classes is not None
        index_of = {name: index for index, name in enumerate(self.classes)}
        images = [(path, index_of[name]) for name, path in found[str(client)]]
        return _ImageFiles(images, self.image_size, self.channels, self.transform)


def _images(client: Path) -> list[tuple[str, Path]]:
    files = sorted(path for path in client.glob("*/*") if path.suffix.lower() in SUFFIXES)
    return [(path.parent.name, path) for path in files]


class _ImageFiles(Dataset):
    def __init__(
        self, images: list[tuple[Path, int]], image_size: int, channels: int, transform: Transform | None
    ) -> None:
        self.images, self.image_size, self.channels, self.transform = images, image_size, channels, transform
        # Lets partition summaries find the labels without opening an image.
        self.targets = [label for _, label in images]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        path, label = self.images[index]
        try:
            with Image.open(path) as image:
                scaled = image.convert("RGB" if self.channels == 3 else "L").resize((self.image_size, self.image_size))
        # Pillow raises SyntaxError for a broken PNG.
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"{path} is not an image or is corrupt ({error}). Fix or delete it.") from error
        pixels = np.array(scaled, dtype=np.float32).reshape(self.image_size, self.image_size, self.channels) / 255
        x = torch.from_numpy(pixels).permute(2, 0, 1).contiguous()
        return x if self.transform is None else self.transform(x), label
