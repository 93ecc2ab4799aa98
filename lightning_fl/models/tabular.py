"""Models of tabular data: classification and regression."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torchmetrics import MeanAbsoluteError

from lightning_fl.models.classifier import Classifier


class TabularMLP(Classifier):
    """A multilayer perceptron that classifies rows of a table: linear layers with ReLU and dropout between them.

    Args:
        in_features: Number of features, ``num_features`` of ``TabularDataModule``.
        hidden: Widths of the hidden layers.
        num_classes: Number of classes, at least 2.
        dropout: Dropout after each hidden layer.
        lr: Learning rate.
        momentum: Momentum of SGD.
    """

    def __init__(
        self,
        in_features: int,
        hidden: Sequence[int] = (64, 32),
        num_classes: int = 2,
        dropout: float = 0.0,
        lr: float = 0.03,
        momentum: float = 0.0,
    ) -> None:
        super().__init__(_perceptron(in_features, hidden, num_classes, dropout), num_classes, lr, momentum)


class TabularRegressor(L.LightningModule):
    """A multilayer perceptron that predicts a number from a table row, trained with SGD on the squared error.

    Batches are pairs ``(x, y)``, ``x`` float32 ``[batch, in_features]``, ``y`` float32 ``[batch]``. The network itself
    predicts the target standardised by ``target_mean`` and ``target_std``. Logs ``train_loss``, ``val_loss``,
    ``val_mae``, ``test_loss`` and ``test_mae`` every epoch; losses are mean squared errors in units of ``target_std``,
    mean absolute errors are in units of the target.

    Args:
        in_features: Number of features, ``num_features`` of ``TabularDataModule``.
        hidden: Widths of the hidden layers; empty for linear regression.
        dropout: Dropout after each hidden layer.
        lr: Learning rate.
        momentum: Momentum of SGD.
        target_mean: The target's mean; an estimate suffices.
        target_std: The target's standard deviation, positive; an estimate suffices.
    """

    def __init__(
        self,
        in_features: int,
        hidden: Sequence[int] = (64, 32),
        dropout: float = 0.0,
        lr: float = 0.01,
        momentum: float = 0.0,
        target_mean: float = 0.0,
        target_std: float = 1.0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        if target_std <= 0:
            raise ValueError(f"target_std={target_std} must be positive.")
        self.net = _perceptron(in_features, hidden, 1, dropout)
        self.lr, self.momentum = lr, momentum
        self.target_mean, self.target_std = target_mean, target_std
        self.val_mae = MeanAbsoluteError()
        self.test_mae = MeanAbsoluteError()

    def forward(self, x: Tensor) -> Tensor:
        """Predictions in the unit of the target, of shape ``[batch]``."""
        return self.net(x).squeeze(1) * self.target_std + self.target_mean

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of a batch."""
        x, y = batch
        loss = self._loss(self(x), y)
        self.log("train_loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(y))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Logs ``val_loss`` and ``val_mae``."""
        self._evaluate(batch, "val", self.val_mae)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Logs ``test_loss`` and ``test_mae``."""
        self._evaluate(batch, "test", self.test_mae)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Predictions of shape ``[batch]``."""
        return self(batch[0] if isinstance(batch, tuple | list) else batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD."""
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=self.momentum)

    def _loss(self, predicted: Tensor, y: Tensor) -> Tensor:
        return mse_loss(predicted / self.target_std, y / self.target_std)

    def _evaluate(self, batch: Any, stage: str, error: MeanAbsoluteError) -> None:
        x, y = batch
        predicted = self(x)
        error.update(predicted, y)
        self.log(f"{stage}_loss", self._loss(predicted, y), prog_bar=True, batch_size=len(y))
        self.log(f"{stage}_mae", error, prog_bar=True, batch_size=len(y))


def _perceptron(in_features: int, hidden: Sequence[int], num_outputs: int, dropout: float) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width_in, width in pairwise([in_features, *hidden]):
        layers += [nn.Linear(width_in, width), nn.ReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*layers, nn.Linear([in_features, *hidden][-1], num_outputs))
