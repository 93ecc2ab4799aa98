"""Residual networks with group normalisation, for images of 32 x 32 pixels."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.functional import pad, relu

from lightning_fl.models.classifier import Classifier


class ResNet20GN(Classifier):
    """ResNet-20 for CIFAR with group normalisation: 269,722 parameters with 10 classes.

    BatchNorm does not suit federated learning: its statistics come from one client's batches and differ between clients
    like their data, and the average of the clients' statistics fits none of the trained models. Group normalisation has
    no such statistics.

    Args:
        in_channels: Channels of an image.
        num_classes: Number of classes, at least 2.
        num_groups: Number of channel groups of each GroupNorm layer; divides 16.
        lr: Learning rate.
        momentum: Momentum of SGD.

    References:
        He, Zhang, Ren, Sun, *Deep Residual Learning for Image Recognition*, 2016, arXiv:1512.03385. Hsieh, Phanishayee,
        Mutlu, Gibbons, *The Non-IID Data Quagmire of Decentralized Machine Learning*, 2020, arXiv:1910.00189.
    """

    def __init__(
        self,
        in_channels: int = 3,
        num_classes: int = 10,
        num_groups: int = 2,
        lr: float = 0.1,
        momentum: float = 0.0,
    ) -> None:
        net = resnet(in_channels, num_classes, (16, 32, 64), (3, 3, 3), num_groups, projection=False)
        super().__init__(net, num_classes, lr, momentum)


class ResNet18GN(Classifier):
    """ResNet-18 with group normalisation and a 3 x 3 stem: 11,173,962 parameters with 10 classes, 11,220,132 with 100.

    Why not BatchNorm: see :class:`ResNet20GN`.

    Args:
        in_channels: Channels of an image.
        num_classes: Number of classes, at least 2.
        num_groups: Number of channel groups of each GroupNorm layer; divides 64.
        lr: Learning rate.
        momentum: Momentum of SGD.

    References:
        Reddi et al., *Adaptive Federated Optimization*, 2021, arXiv:2003.00295.
    """

    def __init__(
        self,
        in_channels: int = 3,
        num_classes: int = 10,
        num_groups: int = 2,
        lr: float = 0.1,
        momentum: float = 0.0,
    ) -> None:
        net = resnet(in_channels, num_classes, (64, 128, 256, 512), (2, 2, 2, 2), num_groups, projection=True)
        super().__init__(net, num_classes, lr, momentum)


def resnet(
    in_channels: int,
    num_classes: int,
    widths: Sequence[int],
    num_blocks: Sequence[int],
    num_groups: int,
    projection: bool,
) -> nn.Sequential:
    """A residual network: a 3 x 3 convolution, stages of blocks of which all but the first halve the image, and a head.

    Args:
        in_channels: Channels of an image.
        num_classes: Number of classes.
        widths: Channels of each stage.
        num_blocks: Blocks of each stage.
        num_groups: Number of channel groups of each GroupNorm layer.
        projection: Whether shortcuts between stages are 1 x 1 convolutions; otherwise they pad channels with zeros.
    """
    blocks: list[nn.Module] = []
    width_in = widths[0]
    for stage, (width, number) in enumerate(zip(widths, num_blocks, strict=True)):
        for index in range(number):
            stride = 2 if stage > 0 and index == 0 else 1
            blocks.append(_Block(width_in, width, stride, num_groups, projection))
            width_in = width
    return nn.Sequential(
        nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False),
        nn.GroupNorm(num_groups, widths[0]),
        nn.ReLU(),
        *blocks,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(widths[-1], num_classes),
    )


class _Block(nn.Module):
    def __init__(self, width_in: int, width: int, stride: int, num_groups: int, projection: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(num_groups, width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(num_groups, width)
        self.shortcut: nn.Module = nn.Identity()
        if width_in != width and projection:
            self.shortcut = nn.Sequential(
                nn.Conv2d(width_in, width, 1, stride, bias=False), nn.GroupNorm(num_groups, width)
            )
        elif width_in != width:
            self.shortcut = _PadChannels(stride, width - width_in)

    def forward(self, x: Tensor) -> Tensor:
        y = relu(self.norm1(self.conv1(x)))
        return relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class _PadChannels(nn.Module):
    def __init__(self, stride: int, num_added: int) -> None:
        super().__init__()
        self.stride, self.num_added = stride, num_added

    def forward(self, x: Tensor) -> Tensor:
        return pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.num_added))
