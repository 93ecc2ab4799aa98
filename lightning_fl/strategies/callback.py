"""The strategy's own callback: where in Lightning's hooks the strategy acts."""

from __future__ import annotations

from typing import Any, Protocol

import lightning as L
from torch.optim import Optimizer


class _Strategy(Protocol):
    """The strategy, as the callback needs it."""

    @property
    def active_driver(self) -> Any:
        """The driver of the current fit's rounds."""

    def start_training(self) -> None:
        """Training is about to start."""

    def interrupt(self) -> None:
        """An exception ends the run."""


class RoundCallback(L.Callback):
    """Stands first in the Trainer's list, so that every other callback sees what the strategy has made of a hook."""

    serves_batches_by_group = True  # what it does to gradients, the trainer's own step does as well

    def __init__(self, strategy: _Strategy) -> None:
        self.strategy = strategy

    @property
    def state_key(self) -> str:
        return "lightning_fl.RoundCallback"

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.strategy.start_training()

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.strategy.active_driver.plan_round()

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        self.strategy.active_driver.prepare_gradients(optimizer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.strategy.active_driver.after_round()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.strategy.interrupt()
