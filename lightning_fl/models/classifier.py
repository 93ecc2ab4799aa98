"""Classification by any network, and by a multilayer perceptron."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics.classification import MulticlassAccuracy


class Classifier(L.LightningModule):
    """Trains a network with SGD on the cross-entropy of its class scores.

    Batches are pairs ``(x, y)``, ``y`` int64 of shape ``[batch]``; or of shape ``[batch, length]`` for a class per
    position of a sequence, with scores of shape ``[batch, num_classes, length]``. Logs ``train_loss``, ``val_loss``,
    ``val_acc``, ``test_loss`` and ``test_acc`` every epoch; accuracy is the share classified correctly.

    Args:
        net: Maps ``x`` to class scores (logits) of shape ``[batch, num_classes]``.
        num_classes: Number of classes, at least 2.
        lr: Learning rate.
        momentum: Momentum of SGD.
    """

    def __init__(self, net: nn.Module, num_classes: int = 10, lr: float = 0.1, momentum: float = 0.0) -> None:
        super().__init__()
        self.save_hyperparameters(ignore="net")  # its weights are in the state_dict
        self.net = net
        self.lr = lr
        self.momentum = momentum
        self.val_acc = MulticlassAccuracy(num_classes, average="micro")
        self.test_acc = MulticlassAccuracy(num_classes, average="micro")

    def unpack(self, batch: Any) -> tuple[Any, Tensor]:
        """Splits a batch into the network's input and the classes; override it for other batches."""
        x, y = batch
        return x, y

    def forward(self, x: Tensor) -> Tensor:
        """Class scores of shape ``[batch, num_classes]``."""
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of a batch."""
        x, y = self.unpack(batch)
        loss = cross_entropy(self(x), y)
        self.log("train_loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(y))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Logs ``val_loss`` and ``val_acc``."""
        self._evaluate(batch, "val", self.val_acc)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Logs ``test_loss`` and ``test_acc``."""
        self._evaluate(batch, "test", self.test_acc)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The most likely classes, int64 of shape ``[batch]``."""
        x = batch[0] if isinstance(batch, tuple | list) else batch
        return self(x).argmax(dim=1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD."""
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=self.momentum)

    def _evaluate(self, batch: Any, stage: str, accuracy: MulticlassAccuracy) -> None:
        x, y = self.unpack(batch)
        scores = self(x)
        accuracy.update(scores, y)
        self.log(f"{stage}_loss", cross_entropy(scores, y), prog_bar=True, batch_size=len(y))
        self.log(f"{stage}_acc", accuracy, prog_bar=True, batch_size=len(y))


class MLPClassifier(Classifier):
    """A :class:`Classifier` with a multilayer perceptron: linear layers with ReLU between them.

    Args:
        in_features: Number of features of an example; ``x`` of shape ``[batch, ...]`` is flattened to it.
        hidden: Widths of the hidden layers; empty for logistic regression.
        num_classes: Number of classes, at least 2.
        lr: Learning rate.
        momentum: Momentum of SGD.
    """

    def __init__(
        self,
        in_features: int = 64,
        hidden: Sequence[int] = (32,),
        num_classes: int = 10,
        lr: float = 0.1,
        momentum: float = 0.0,
    ) -> None:
        layers: list[nn.Module] = [nn.Flatten()]
        for width_in, width_out in pairwise([in_features, *hidden]):
            layers += [nn.Linear(width_in, width_out), nn.ReLU()]
        layers.append(nn.Linear([in_features, *hidden][-1], num_classes))
        super().__init__(nn.Sequential(*layers), num_classes, lr, momentum)
