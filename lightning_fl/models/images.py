"""The small image classifiers of the federated-learning papers."""

from __future__ import annotations

from torch import nn

from lightning_fl.models.classifier import Classifier, MLPClassifier


class LogisticRegression(MLPClassifier):
    """Multinomial logistic regression: one linear layer; 7,850 parameters on MNIST.

    Args:
        in_features: Number of features of an example; ``x`` of shape ``[batch, ...]`` is flattened to it.
        num_classes: Number of classes, at least 2.
        lr: Learning rate.
        momentum: Momentum of SGD.
    """

    def __init__(self, in_features: int = 784, num_classes: int = 10, lr: float = 0.03, momentum: float = 0.0) -> None:
        super().__init__(in_features, (), num_classes, lr, momentum)


class TwoNN(MLPClassifier):
    """The 2NN of the FedAvg paper: two hidden layers of 200 units with ReLU; 199,210 parameters on MNIST.

    Args:
        in_features: Number of features of an example; ``x`` of shape ``[batch, ...]`` is flattened to it.
        num_classes: Number of classes, at least 2.
        lr: Learning rate.
        momentum: Momentum of SGD.

    References:
        McMahan et al., *Communication-Efficient Learning of Deep Networks from Decentralized Data*, 2017,
        arXiv:1602.05629.
    """

    def __init__(self, in_features: int = 784, num_classes: int = 10, lr: float = 0.1, momentum: float = 0.0) -> None:
        super().__init__(in_features, (200, 200), num_classes, lr, momentum)


class FedAvgCNN(Classifier):
    """The CNN of the FedAvg paper: 5x5 convolutions with 32 and 64 channels, each with 2x2 max pooling, and 512 units.

    1,663,370 parameters on MNIST.

    Args:
        in_channels: Channels of an image.
        image_size: Height and width of an image in pixels, a multiple of 4.
        num_classes: Number of classes, at least 2.
        lr: Learning rate.
        momentum: Momentum of SGD.

    References:
        McMahan et al., *Communication-Efficient Learning of Deep Networks from Decentralized Data*, 2017,
        arXiv:1602.05629.
    """

    def __init__(
        self,
        in_channels: int = 1,
        image_size: int = 28,
        num_classes: int = 10,
        lr: float = 0.1,
        momentum: float = 0.0,
    ) -> None:
        net = nn.Sequential(
            nn.Conv2d(in_channels, 32, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64 * (image_size // 4) ** 2, 512),
            nn.ReLU(),
            nn.Linear(512, num_classes),
        )
        super().__init__(net, num_classes, lr, momentum)


class LeNet(Classifier):
    """The CNN of NIID-Bench: 5x5 convolutions with 6 and 16 channels, each with 2x2 max pooling; 120 and 84 units.

    62,006 parameters on CIFAR-10, 44,426 on MNIST.

    Args:
        in_channels: Channels of an image.
        image_size: Height and width of an image in pixels, at least 16.
        num_classes: Number of classes, at least 2.
        lr: Learning rate.
        momentum: Momentum of SGD.

    References:
        Li, Diao, Chen, He, *Federated Learning on Non-IID Data Silos: An Experimental Study* (NIID-Bench), 2022,
        arXiv:2102.02079.
    """

    def __init__(
        self,
        in_channels: int = 1,
        image_size: int = 28,
        num_classes: int = 10,
        lr: float = 0.01,
        momentum: float = 0.9,
    ) -> None:
        side = ((image_size - 4) // 2 - 4) // 2
        net = nn.Sequential(
            nn.Conv2d(in_channels, 6, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 16, 5),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(16 * side**2, 120),
            nn.ReLU(),
            nn.Linear(120, 84),
            nn.ReLU(),
            nn.Linear(84, num_classes),
        )
        super().__init__(net, num_classes, lr, momentum)
