"""The strategy's own callback: where in Lightning's hooks a round begins and ends."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import lightning as L
from torch.optim import Optimizer

if TYPE_CHECKING:
    from lightning_fl.strategies.federated import FederatedStrategy


class RoundCallback(L.Callback):
    """Stands first in the Trainer's list, so that every other callback sees the aggregated global model."""

    follows_idle_rounds = True

    def __init__(self, strategy: FederatedStrategy) -> None:
        self.strategy = strategy

    @property
    def state_key(self) -> str:
        return "lightning_fl.RoundCallback"

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.strategy.start_training()

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.strategy.active_rounds.plan_round()

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        self.strategy.active_rounds.transform_grads(optimizer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.strategy.active_rounds.after_batch(outputs, batch, batch_idx)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.strategy.active_rounds.after_round()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.strategy.interrupt()
