"""Image segmentation."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional


class SmallUNet(L.LightningModule):
    r"""A U-Net with one downsampling step and GroupNorm, for one foreground class, trained with Adam.

    The loss is the sum of the binary cross-entropy and the soft Dice loss. Batches are pairs ``(x, y)``, ``x`` float32
    ``[batch, channels, height, width]`` of even height and width, ``y`` float32 ``[batch, height, width]`` of 0 and 1.
    Logs ``train_loss`` and ``val_dice``, :math:`2|A \cap B| / (|A| + |B|)` over the pixels of all validation images.

    Args:
        channels: Channels of the images.
        width: Channels of the first layer, a multiple of 4.
        lr: Learning rate.

    References:
        Ronneberger et al., *U-Net*, 2015, arXiv:1505.04597; Milletari et al., *V-Net*, 2016, arXiv:1606.04797.
    """

    def __init__(self, channels: int = 1, width: int = 8, lr: float = 0.01) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr = lr
        self.down = _block(channels, width)
        self.bottom = _block(width, 2 * width)
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.out = nn.Sequential(_block(2 * width, width), nn.Conv2d(width, 1, 1))
        self._overlap, self._areas = 0.0, 0.0

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[batch, height, width]``."""
        first = self.down(x)
        deep = self.bottom(functional.max_pool2d(first, 2))
        return self.out(torch.cat([first, self.up(deep)], dim=1)).squeeze(1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of a batch."""
        x, y = batch
        logits = self(x)
        probabilities = logits.sigmoid()
        dice = (2 * (probabilities * y).sum() + 1) / (probabilities.sum() + y.sum() + 1)
        loss = functional.binary_cross_entropy_with_logits(logits, y) + 1 - dice
        self.log("train_loss", loss.detach(), on_step=False, on_epoch=True, batch_size=len(y))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Counts overlapping pixels."""
        x, y = batch
        found = (self(x) > 0).float()
        self._overlap += float((found * y).sum())
        self._areas += float(found.sum() + y.sum())

    def on_validation_epoch_end(self) -> None:
        """Logs the Dice score, 1 if there is no foreground and none was predicted."""
        self.log("val_dice", 2 * self._overlap / self._areas if self._areas else 1.0, prog_bar=True)
        self._overlap, self._areas = 0.0, 0.0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=self.lr)


def _block(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, width, 3, padding=1), nn.GroupNorm(4, width), nn.ReLU())
