"""Classification of windows of signals."""

from __future__ import annotations

from torch import nn

from lightning_fl.models.classifier import Classifier


class SignalCNN(Classifier):
    """Two convolutions over time with GroupNorm, averaged over time, for windows ``[batch, channels, length]``.

    Args:
        channels: Channels of the signal.
        num_classes: Number of classes.
        width: Channels of the first convolution, a multiple of 4.
        lr: Learning rate.
        momentum: Momentum of SGD.
    """

    def __init__(
        self, channels: int = 3, num_classes: int = 4, width: int = 16, lr: float = 0.05, momentum: float = 0.9
    ) -> None:
        layers = [
            *(nn.Conv1d(channels, width, 7, padding=3), nn.GroupNorm(4, width), nn.ReLU(), nn.MaxPool1d(2)),
            *(nn.Conv1d(width, 2 * width, 5, padding=2), nn.GroupNorm(4, 2 * width), nn.ReLU()),
            *(nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(2 * width, num_classes)),
        ]
        super().__init__(nn.Sequential(*layers), num_classes, lr, momentum)
