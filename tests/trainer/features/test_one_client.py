"""One client that keeps its optimizer is a plain Trainer.fit."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW, RMSprop
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, OneCycleLR, StepLR

import lightning_fl as fl
from lightning_fl import FederatedStrategy
from tests.helpers.training import Plain, loader, trainer, weights

ROUNDS = 3


def scheduled(make_optimizer: Any, make_scheduler: Any, interval: str = "step", frequency: int = 1) -> Any:
    def make(params: Any) -> dict[str, Any]:
        optimizer = make_optimizer(params)
        config = {"scheduler": make_scheduler(optimizer), "interval": interval, "frequency": frequency}
        return {"optimizer": optimizer, "lr_scheduler": config}

    return make


OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "sgd": partial(SGD, lr=0.1),
    "momentum": partial(SGD, lr=0.1, momentum=0.9, nesterov=True),
    "adam": partial(Adam, lr=0.01),
    "adamw": partial(AdamW, lr=0.01, amsgrad=True),
    "adagrad": partial(Adagrad, lr=0.1),
    "rmsprop": partial(RMSprop, lr=0.01, momentum=0.5),
    "cosine by step": scheduled(partial(SGD, lr=0.1, momentum=0.9), partial(CosineAnnealingLR, T_max=18)),
    "one cycle": scheduled(partial(Adam, lr=0.01), partial(OneCycleLR, max_lr=0.05, total_steps=18)),
    "every second step": scheduled(partial(SGD, lr=0.1), partial(StepLR, step_size=1, gamma=0.7), frequency=2),
    "by epoch": scheduled(partial(SGD, lr=0.1), partial(ExponentialLR, gamma=0.5), interval="epoch"),
    "every second epoch": scheduled(
        partial(SGD, lr=0.1), partial(ExponentialLR, gamma=0.5), interval="epoch", frequency=2
    ),
}


def fit(strategy: Any, data: Any, module: Plain, **kwargs: Any) -> torch.Tensor:
    trainer(strategy, ROUNDS, **kwargs).fit(module, data)
    return weights(module)


def one_client(**kwargs: Any) -> FederatedStrategy:
    return FederatedStrategy("fedavg", client_optimizer="keep", **kwargs)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.spread(7)
def test_equals_a_plain_trainer(name: str, dtype: torch.dtype, rtol: float) -> None:
    federated = fit(
        one_client(), fl.datamodules.ClientLoaders([loader()]), Plain(dtype, make_optimizer=OPTIMIZERS[name])
    )
    plain = fit("auto", loader(), Plain(dtype, make_optimizer=OPTIMIZERS[name]))
    torch.testing.assert_close(federated, plain, rtol=rtol, atol=rtol * 0.1)


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_clip_val": 0.1},
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
        {"accumulate_grad_batches": 4},
        {"limit_train_batches": 2},
        {"limit_train_batches": 0.5},
        {"overfit_batches": 2},
        {"max_steps": 12},
    ],
)
def test_equals_a_plain_trainer_with(options: dict[str, Any]) -> None:
    make = scheduled(partial(SGD, lr=0.1, momentum=0.9), partial(StepLR, step_size=2, gamma=0.5))
    federated = fit(one_client(), fl.datamodules.ClientLoaders([loader()]), Plain(make_optimizer=make), **options)
    plain = fit("auto", loader(), Plain(make_optimizer=make), **options)
    torch.testing.assert_close(federated, plain, rtol=1e-10, atol=1e-12)


class ChangesState(Plain):
    """Changes the optimizer's state between epochs, in one of the ways that users do."""

    def __init__(self, how: str) -> None:
        super().__init__(make_optimizer=partial(SGD, lr=0.1, momentum=0.9))
        self.how = how

    def _change(self, hook: str) -> None:
        optimizer = self.trainer.optimizers[0]
        if self.how == f"clear, {hook}":
            optimizer.state.clear()
        elif self.how == f"zero, {hook}":
            for state in optimizer.state.values():
                state["momentum_buffer"].zero_()
        elif self.how == f"load, {hook}":
            optimizer.load_state_dict({"state": {}, "param_groups": optimizer.state_dict()["param_groups"]})

    def on_train_epoch_start(self) -> None:
        self._change("start")

    def on_train_epoch_end(self) -> None:
        self._change("end")


@pytest.mark.parametrize("how", ["clear, end", "clear, start", "zero, end", "zero, start", "load, end"])
def test_hooks_change_the_optimizers_state_as_in_a_plain_trainer(how: str) -> None:
    federated = fit(one_client(), fl.datamodules.ClientLoaders([loader()]), ChangesState(how))
    plain = fit("auto", loader(), ChangesState(how))
    torch.testing.assert_close(federated, plain, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(plain, fit("auto", loader(), ChangesState("")), rtol=1e-3)


@pytest.mark.filterwarnings("ignore:The dirpath has changed from")
@pytest.mark.parametrize("how", ["", "zero, start"])
def test_the_optimizers_state_is_resumed_before_the_hooks_see_it(how: str) -> None:
    def run(rounds: int, folder: str, path: str | None = None) -> tuple[Any, Any]:
        saves, module = ModelCheckpoint(folder, save_last=True), ChangesState(how)
        fit = trainer(one_client(), rounds, callbacks=[saves], enable_checkpointing=True)
        fit.fit(module, fl.datamodules.ClientLoaders([loader()]), ckpt_path=path)
        return fit, module

    _, whole = run(3, "whole")
    first, _ = run(1, "saved")
    first.save_checkpoint("after.ckpt")
    for number, path in enumerate(("saved/last.ckpt", "after.ckpt")):
        _, resumed = run(3, f"resumed{number}", path)
        torch.testing.assert_close(weights(resumed), weights(whole), rtol=0, atol=0)
        # The client's state holds it, and no other client may start from it.
        assert not torch.load(path, weights_only=True)["optimizer_states"][0]["state"]


def test_changes_that_reach_no_client_are_warned_of() -> None:
    class Steps(ChangesState):
        def on_train_epoch_end(self) -> None:
            self.training_step(next(iter(loader())), 0).backward()
            self.trainer.optimizers[0].step()

    class Clears(fl.callbacks.FederatedCallback):
        def on_client_start(self, trainer: Any, module: Any, client: Any, view: Any) -> None:
            trainer.optimizers[0].state.clear()

    clients = fl.datamodules.ClientLoaders([loader(), loader()])
    with pytest.warns(UserWarning, match="was changed before round 1, which has no effect"):
        fit(one_client(), clients, Steps(""))
    cleared = fit(one_client(), clients, ChangesState(""), callbacks=[Clears()])  # what the warning advises
    fresh = fit("fedavg", clients, ChangesState(""))
    torch.testing.assert_close(cleared, fresh, rtol=1e-10, atol=1e-12)


def test_two_local_epochs_are_two_epochs_even_with_accumulation() -> None:
    make = partial(Adam, lr=0.01)
    federated, plain = Plain(make_optimizer=make), Plain(make_optimizer=make)
    clients = fl.datamodules.ClientLoaders([loader()])
    trainer(one_client(local_epochs=2), 2, accumulate_grad_batches=4).fit(federated, clients)
    trainer("auto", 4, accumulate_grad_batches=4).fit(plain, loader())
    torch.testing.assert_close(weights(federated), weights(plain), rtol=1e-10, atol=1e-12)


def test_a_fresh_optimizer_each_round_is_another_training() -> None:
    make = partial(Adam, lr=0.01)
    clients = fl.datamodules.ClientLoaders([loader()])
    kept = fit(one_client(), clients, Plain(make_optimizer=make))
    fresh = fit("fedavg", clients, Plain(make_optimizer=make))
    assert not torch.allclose(kept, fresh, rtol=1e-3)


def test_buffers_follow_the_only_client() -> None:
    def module() -> Plain:
        plain = Plain(torch.float32)
        plain.net = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
        nn.init.ones_(plain.net[1].weight)
        nn.init.ones_(plain.net[3].weight)
        plain.load_state_dict({name: torch.zeros_like(t) + 0.1 for name, t in plain.state_dict().items()})
        return plain

    federated = fit(one_client(), fl.datamodules.ClientLoaders([loader()]), module())
    plain = fit("auto", loader(), module())
    torch.testing.assert_close(federated, plain, rtol=1e-5, atol=1e-6)
