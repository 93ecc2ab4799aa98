"""The strategy's own callback, which forwards Lightning's hooks to the strategy."""

from __future__ import annotations

from typing import Any, Protocol

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch.optim import Optimizer


class _Strategy(Protocol):
    """The part of the strategy that the callback uses."""

    @property
    def active_driver(self) -> Any:
        """The driver of the current fit's rounds."""

    def start_training(self) -> None:
        """Called when training starts."""

    def join_nodes(self) -> None:
        """Called before the global model is used."""

    def interrupt(self) -> None:
        """Called when an exception ends the run."""


class RoundCallback(L.Callback):
    """Comes first in ``trainer.callbacks``, so that in each hook the strategy acts before every other callback."""

    serves_batches_by_group = True  # the tight loop prepares the gradients itself

    def __init__(self, strategy: _Strategy) -> None:
        self.strategy = strategy

    @property
    def state_key(self) -> str:
        return "lightning_fl.RoundCallback"

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch > 0 and trainer.ckpt_path is not None:
            rank_zero_info(f"Resuming with round {trainer.current_epoch + 1} after {trainer.ckpt_path}.")
        self.strategy.start_training()

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.strategy.active_driver.plan_round()

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        self.strategy.active_driver.prepare_gradients(optimizer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.strategy.join_nodes()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.strategy.join_nodes()
        self.strategy.active_driver.end_training()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.strategy.active_driver.after_round()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.strategy.interrupt()
