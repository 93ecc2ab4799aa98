"""The model: an ordinary LightningModule. It knows nothing about the federation."""

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics.classification import BinaryAccuracy


class FailureModel(L.LightningModule):
    """Predicts from the readings of a machine whether it fails."""

    def __init__(self, num_features: int = 4, hidden: int = 16, lr: float = 0.05) -> None:
        super().__init__()
        self.save_hyperparameters()
        # No BatchNorm: sites with different data have different statistics. GroupNorm and LayerNorm are fine.
        self.net = nn.Sequential(nn.Linear(num_features, hidden), nn.ReLU(), nn.Linear(hidden, 2))
        self.lr = lr
        self.val_acc = BinaryAccuracy()
        self.test_acc = BinaryAccuracy()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        scores = self.net(x)
        loss = cross_entropy(scores, y)
        # A site's own value goes to clients.parquet; the loggers see the mean over all examples of the round.
        self.log("train_loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(y))
        self.log("train_acc", (scores.argmax(1) == y).float().mean(), on_step=False, on_epoch=True, batch_size=len(y))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        scores = self.net(x)
        self.val_acc(scores.argmax(1), y)
        self.log("val_loss", cross_entropy(scores, y), prog_bar=True, batch_size=len(y))
        self.log("val_acc", self.val_acc, prog_bar=True, batch_size=len(y))

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch
        self.test_acc(self.net(x).argmax(1), y)
        self.log("test_acc", self.test_acc, batch_size=len(y))

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The probability of a failure, for each row."""
        return self.net(batch[0]).softmax(1)[:, 1]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # Each site starts a round with a new optimizer, unless the strategy has client_optimizer: keep.
        return torch.optim.SGD(self.parameters(), lr=self.lr)
