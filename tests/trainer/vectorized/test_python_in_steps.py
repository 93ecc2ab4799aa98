"""The user's Python runs in each step of clients that train together, so that what it reads counts at once."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

import lightning_fl as fl
from tests.helpers.training import Plain, image_clients, trainer, weights


class Counting(Plain):
    factor = 1.0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * self.scale(batch_idx)

    def scale(self, batch_idx: int) -> Any:
        return self.factor


class ByBatch(Counting):
    def scale(self, batch_idx: int) -> Any:
        return 2.0 if batch_idx % 2 else 1.0


class ByBatchTensor(Counting):
    def scale(self, batch_idx: int) -> Any:
        return torch.tensor(1.0) * (batch_idx + 1)


class ByRound(Counting):
    def scale(self, batch_idx: int) -> Any:
        return 1.0 + self.current_epoch


class ByTrainer(Counting):
    def scale(self, batch_idx: int) -> Any:
        return 3.0 if self.trainer.global_step > 4 else 1.0


class LoggingNumber(Counting):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.log("factor", type(self).factor, on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)


class ByRoundIfThereIsOne(Counting):
    def scale(self, batch_idx: int) -> Any:
        try:
            return 1.0 + self.trainer.current_epoch
        except Exception:
            return 1.0


class HoldingTrainer(Counting):
    def on_fit_start(self) -> None:
        self.held = types.SimpleNamespace(trainer=self.trainer)

    def scale(self, batch_idx: int) -> Any:
        return 1.0 + self.held.trainer.current_epoch


class HoldingOptimizer(Counting):
    def configure_optimizers(self) -> Any:
        self.optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.9)
        return [self.optimizer], [{"scheduler": schedule, "interval": "step"}]

    def scale(self, batch_idx: int) -> Any:
        return 1.0 + 5 * self.optimizer.param_groups[0]["lr"]


class Change(L.Callback):
    """Changes what a step reads, at the start of each round."""

    def __init__(self, change: Callable[[Any, float], Any]) -> None:
        self.change = change

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.change(pl_module, 1.0 + trainer.current_epoch)


def set_factor(module: Any, factor: float) -> None:
    module.factor = factor


def fit(kind: Any, engine: Any, rounds: int = 4, callbacks: Any = (), **of_trainer: Any) -> Tensor:
    module = kind()
    strategy = fl.FederatedStrategy("fedavg", engine=engine, seed=3)
    trainer(strategy, rounds, callbacks=list(callbacks), **of_trainer).fit(module, image_clients((23,) * 5))
    return weights(module)


@pytest.mark.parametrize(
    "kind",
    [
        *(ByBatch, ByBatchTensor, ByRound, ByTrainer, ByRoundIfThereIsOne, HoldingTrainer, HoldingOptimizer),
        LoggingNumber,
    ],
)
@pytest.mark.spread(3)
def test_a_step_that_looks_at_what_changes(kind: type[Counting]) -> None:
    together, alone = fit(kind, "vectorized"), fit(kind, "sequential")
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-11)


def test_a_changed_attribute_is_seen() -> None:
    together, alone = (fit(Counting, engine, callbacks=[Change(set_factor)]) for engine in ("vectorized", "sequential"))
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("hook", ["on_train_epoch_start", "on_train_epoch_end"])
def test_parameters_may_be_frozen_and_unfrozen(hook: str) -> None:
    class Deep(Plain):
        def __init__(self) -> None:
            super().__init__()
            for index in (3, 4):
                self.net.insert(index, nn.Linear(8, 8, dtype=torch.float64))
                nn.init.eye_(self.net[index].weight)
                nn.init.zeros_(self.net[index].bias)
            self.net[4].requires_grad_(False)

    class Swap(L.Callback):
        pass

    def swap(self: Any, trainer: L.Trainer, pl_module: Any) -> None:
        pl_module.net[3].requires_grad_(trainer.current_epoch < 2)
        pl_module.net[4].requires_grad_(trainer.current_epoch >= 2)

    setattr(Swap, hook, swap)
    together = fit(Deep, "vectorized", callbacks=[Swap()])
    torch.testing.assert_close(together, fit(Deep, "sequential", callbacks=[Swap()]), rtol=1e-9, atol=1e-11)


def test_detect_anomaly() -> None:
    together, alone = (fit(Counting, engine, detect_anomaly=True) for engine in ("vectorized", "sequential"))
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-11)
