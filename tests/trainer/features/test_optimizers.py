"""Optimizers that are replaced between rounds, and schedules that a module steps by hand."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

import lightning_fl as fl
from lightning_fl import FederatedStrategy
from lightning_fl.datamodules import ClientLoaders
from tests.helpers.training import Plain, image_clients, loader, trainer, weights


class Replacing(fl.callbacks.FederatedCallback):
    """From round 1 on the module trains with Adam; notes how many steps are behind each client's optimizer."""

    def __init__(self, hook: str, sets_up: bool) -> None:
        self.sets_up, self.seen = sets_up, []
        setattr(self, hook, self.replace)

    def replace(self, trainer: L.Trainer, module: Any, *args: Any) -> None:
        if trainer.current_epoch != 1 or isinstance(trainer.optimizers[0], torch.optim.Adam):
            return
        module.make_optimizer = lambda params: torch.optim.Adam(params, lr=0.01)
        if self.sets_up:
            trainer.strategy.setup_optimizers(trainer)
        else:
            trainer.optimizers = [module.configure_optimizers()]

    def on_client_start(self, trainer: L.Trainer, module: L.LightningModule, client: int | str) -> None:
        self.seen.append((type(trainer.optimizers[0]).__name__, len(trainer.optimizers[0].state)))


class Looking(L.Callback):
    def on_train_batch_end(self, *args: Any) -> None:
        """Makes the step pass Lightning's hooks."""


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("sets_up", [False, True])
def test_optimizers_replaced_between_rounds_are_used_and_reset(sets_up: bool, hooked: bool) -> None:
    replacing, module = Replacing("on_train_epoch_start", sets_up), Plain()
    run = trainer(FederatedStrategy(engine="sequential"), 2, callbacks=[replacing, *([Looking()] if hooked else [])])
    run.fit(module, image_clients((8, 8)))
    assert replacing.seen == [("SGD", 0)] * 2 + [("Adam", 0)] * 2
    assert [entry["num_steps"] for entry in run.strategy.history] == [run.global_step // 2] * 2
    expected = Plain()
    trainer(FederatedStrategy(engine="sequential"), 2).fit(expected, image_clients((8, 8)))
    assert not torch.equal(weights(module), weights(expected))


def test_optimizers_replaced_inside_a_round_are_refused() -> None:
    replacing = Replacing("on_client_end", sets_up=False)
    with pytest.raises(MisconfigurationException, match="replaced inside round 1"):
        trainer("fedavg", 2, callbacks=[replacing]).fit(Plain(), image_clients((8, 8)))


class Uncounted:
    """A schedule as those of timm: it counts nothing that others know."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer, self.calls = optimizer, 0

    def step(self, metric: float) -> None:
        self.calls += 1
        for group in self.optimizer.param_groups:
            group["lr"] = 0.1 / (1 + self.calls)

    def state_dict(self) -> dict[str, Any]:
        return {"calls": self.calls}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.calls = state["calls"]


class ByHand(Plain):
    def __init__(self, kind: Any) -> None:
        super().__init__()
        self.automatic_optimization, self.kind = False, kind

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        optimizer: Any = self.optimizers()
        schedule: Any = self.lr_schedulers()
        loss = super().training_step(batch, batch_idx)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        schedule.step(1.0)  # a metric that never improves
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [self.kind(optimizer)]


def plateau(optimizer: Any) -> Any:
    return ReduceLROnPlateau(optimizer, patience=0, factor=0.5, min_lr=1e-4)


@pytest.mark.parametrize("kind", [Uncounted, plateau])
def test_schedules_that_are_stepped_by_hand_with_a_metric(kind: Any) -> None:
    alone, plain = ByHand(kind), ByHand(kind)
    trainer(FederatedStrategy(client_optimizer="keep"), 3).fit(alone, ClientLoaders([loader(16)]))
    trainer("auto", 3).fit(plain, loader(16))
    torch.testing.assert_close(weights(alone), weights(plain))
    several = trainer(FederatedStrategy(seed=0), 2)
    several.fit(ByHand(kind), ClientLoaders([loader(8), loader(16), loader(8)]))
    schedule = several.lr_scheduler_configs[0].scheduler
    steps = 2 * len(loader(16))  # those of the largest client
    assert schedule.state_dict().get("calls", schedule.state_dict().get("last_epoch")) == steps
