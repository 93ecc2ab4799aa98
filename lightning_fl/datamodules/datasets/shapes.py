"""Synthetic images with a shape to be segmented, from scanners that differ."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.utils.data import TensorDataset

from lightning_fl.datamodules.natural import ClientData, NaturalDataModule
from lightning_fl.seeding import derive_seed


class ShapesDataModule(NaturalDataModule):
    """Synthetic grey images of an ellipse or a rectangle in noise; each client is a scanner with its own contrast.

    Samples are pairs of float32 images ``[1, size, size]`` and float32 masks ``[size, size]`` of 0 and 1. Scanners
    differ in contrast and noise; even ones show ellipses, odd ones rectangles. A scanner's images are generated from
    the seed and its number when they are needed.

    Args:
        num_clients: Number of scanners.
        images: Number of images per scanner.
        size: Height and width in pixels, even and at least 16.
        batch_size: Examples per training batch.
        test_share: Fraction of each scanner's images held out for test, in [0, 1).
        **kwargs: ``val_share``, ``seed`` (also of the data), ``num_workers`` and ``eval_batch_size``; see
            :class:`NaturalDataModule`.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        num_clients: int = 6,
        images: int = 60,
        size: int = 32,
        batch_size: int = 16,
        test_share: float = 0.2,
        **kwargs: Any,
    ) -> None:
        super().__init__(batch_size=batch_size, test_share=test_share, **kwargs)
        if num_clients < 1 or images < 2 or size < 16 or size % 2:
            raise ValueError(
                f"num_clients={num_clients}, images={images}, size={size}: expected at least 1, at least 2, and an "
                "even number from 16."
            )
        self.num_clients = num_clients
        self.images = images
        self.size = size

    def read(self) -> ClientData:
        """The scanners and their images."""
        return ClientData(range(self.num_clients), lambda client: self.images, self._make)

    def _make(self, client: int) -> TensorDataset:
        rng = np.random.default_rng(derive_seed(self.seed, client, "shapes"))
        contrast, noise = rng.uniform(0.6, 1.6), rng.uniform(0.2, 0.6)
        rows, columns = np.mgrid[: self.size, : self.size]
        centres = rng.uniform(0.3, 0.7, (2, self.images, 1, 1)) * self.size
        radii = rng.uniform(0.12, 0.28, (2, self.images, 1, 1)) * self.size
        across, down = np.abs(columns - centres[0]) / radii[0], np.abs(rows - centres[1]) / radii[1]
        masks = across**2 + down**2 <= 1 if client % 2 == 0 else np.maximum(across, down) <= 1
        pixels = contrast * masks + noise * rng.normal(size=masks.shape)
        return TensorDataset(
            torch.from_numpy(pixels.astype(np.float32)).unsqueeze(1), torch.from_numpy(masks.astype(np.float32))
        )
