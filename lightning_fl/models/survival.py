"""Survival analysis: times until an event, some of them censored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lightning_fl.models.tabular import _perceptron


class DeepSurv(L.LightningModule):
    r"""A network for the log hazard, trained with SGD on Cox's partial likelihood (Breslow's ties) of a batch.

    The loss is the mean over the events :math:`i` of :math:`\log\sum_{j: t_j \ge t_i} e^{f(x_j)} - f(x_i)`. The loss
    compares the patients in a batch with each other, so a client's batch should contain all its rows; patients of
    different clients are not compared, as in Cox's model stratified by client. Without hidden layers it is Cox's linear
    model.
    Batches are pairs ``(x, y)``, ``x`` float32 ``[batch, in_features]``, ``y`` float32 ``[batch, 2]`` with time and
    event (0 or 1). Logs ``train_loss`` and ``val_cindex``, Harrell's concordance over all validation data, every epoch.

    Args:
        in_features: Number of features.
        hidden: Widths of the hidden layers; empty for Cox's model.
        dropout: Dropout after each hidden layer.
        lr: Learning rate.
        momentum: Momentum of SGD.

    References:
        Katzman et al., *DeepSurv*, BMC Medical Research Methodology, 2018, arXiv:1606.00931.
    """

    def __init__(
        self,
        in_features: int,
        hidden: Sequence[int] = (16,),
        dropout: float = 0.0,
        lr: float = 0.05,
        momentum: float = 0.0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = _perceptron(in_features, hidden, 1, dropout)
        self.lr, self.momentum = lr, momentum
        self._seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor) -> Tensor:
        """Log hazards up to a constant, of shape ``[batch]``."""
        return self.net(x).squeeze(1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The loss of a batch."""
        x, y = batch
        loss = cox_loss(self(x), y)
        self.log("train_loss", loss.detach(), on_step=False, on_epoch=True, batch_size=len(y))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Collects a batch for the concordance, which is computed over all pairs."""
        x, y = batch
        self._seen.append((self(x), y))

    def on_validation_epoch_end(self) -> None:
        """Logs the concordance."""
        risk, y = (torch.cat(parts) for parts in zip(*self._seen, strict=True))
        self._seen = []
        self.log("val_cindex", concordance(risk, y), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD."""
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=self.momentum)


def cox_loss(risk: Tensor, y: Tensor) -> Tensor:
    """The mean negative log partial likelihood; 0 if there is no event.

    Args:
        risk: Log hazards ``[batch]``.
        y: Time and event ``[batch, 2]``.
    """
    time, event = y.unbind(1)
    at_risk = time[None, :] >= time[:, None]
    log_sums = torch.where(at_risk, risk[None, :], -torch.inf).logsumexp(1)
    return ((log_sums - risk) * event).sum() / event.sum().clamp_min(1.0)


def concordance(risk: Tensor, y: Tensor) -> Tensor:
    """Harrell's C: the share of comparable pairs in which the one with the earlier event has the higher risk.

    Args:
        risk: Log hazards ``[examples]``; equal ones count half.
        y: Time and event ``[examples, 2]``.
    """
    time, event = y.unbind(1)
    comparable = (time[:, None] < time[None, :]) & (event[:, None] > 0)
    right = (risk[:, None] > risk[None, :]).double() + 0.5 * (risk[:, None] == risk[None, :]).double()
    return (right * comparable).sum() / comparable.sum().clamp_min(1)
