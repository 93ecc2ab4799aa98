"""The strategy's own callback: where in Lightning's hooks a round begins and ends."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
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


def has_hooks(trainer: L.Trainer, *names: str) -> bool:
    """Whether the user's module or callbacks have one of these hooks; Lightning's own act alike on all ranks."""
    holders = [trainer.lightning_module, *trainer.callbacks]  # type: ignore[attr-defined]
    return any(_is_of_user(getattr(holder, name, None)) for holder in holders for name in names)


def run_training_step(trainer: L.Trainer, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """One client's training step, in the way of the callbacks that want to run it themselves."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        own = getattr(callback, "run_training_step", None)
        if own is not None:
            step = partial(own, trainer, trainer.lightning_module, step)
    return step(*args, **kwargs)


def _is_of_user(hook: Any) -> bool:
    function = getattr(hook, "__func__", hook)
    return function is not None and not getattr(function, "__module__", "").startswith(("lightning.", "lightning_fl."))
