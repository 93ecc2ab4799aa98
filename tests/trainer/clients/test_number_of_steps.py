"""How many steps a module is told of before training, and how many examples a client's stream has."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR
from torch.utils.data import DataLoader, IterableDataset

import lightning_fl as fl
from lightning_fl import FederatedStrategy
from lightning_fl.datamodules import ClientLoaders
from tests.helpers.training import Plain, image_clients, images, loader, trainer, weights


class Lengths(Plain):
    """The widespread way to find the number of steps, for a warm-up."""

    def configure_optimizers(self) -> Any:
        self.trainer.fit_loop.setup_data()
        self.length = len(self.trainer.train_dataloader)  # type: ignore[arg-type]
        optimizer, warm_up = super().configure_optimizers(), self.length
        schedule = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warm_up))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@pytest.mark.parametrize("strategy", ["auto", FederatedStrategy(local_epochs=1, client_optimizer="keep")])
def test_the_length_of_the_loader_is_known_when_optimizers_are_made(strategy: Any) -> None:
    module = Lengths()
    trainer(strategy, 2).fit(module, loader(16) if strategy == "auto" else ClientLoaders([loader(16)]))
    assert module.length == len(loader(16))
    expected = Lengths()
    trainer("auto", 2).fit(expected, loader(16))
    torch.testing.assert_close(weights(module), weights(expected))


def test_it_is_that_of_the_largest_client_and_of_its_passes() -> None:
    module = Lengths()
    trainer(FederatedStrategy(local_epochs=3)).fit(module, ClientLoaders([loader(8), loader(16)]))
    assert module.length == 3 * len(loader(16))
    assert module.trainer.num_training_batches == len(loader(16)) * 3 + len(loader(8)) * 3


class Stream(IterableDataset):
    def __init__(self, size: int) -> None:
        self.size = size

    def __iter__(self) -> Iterator[Any]:
        return iter([images(self.size)[index] for index in range(self.size)])


def test_a_stream_has_no_length() -> None:
    with pytest.raises(TypeError, match="some clients have no length"):
        trainer("fedavg").fit(Lengths(), ClientLoaders([DataLoader(Stream(8), 4)]))


class Weights(fl.callbacks.FederatedCallback):
    def __init__(self) -> None:
        self.seen: set[float] = set()

    def on_client_end(self, trainer: L.Trainer, module: L.LightningModule, client: Any, run: Any, update: Any) -> None:
        self.seen.add(run.weight)


@pytest.mark.parametrize("local_epochs", [1, 3, fl.clients.Between(1, 4)])
def test_a_stream_weighs_the_examples_of_one_pass(local_epochs: Any) -> None:
    found = Weights()
    clients = ClientLoaders([DataLoader(Stream(8), 4), DataLoader(Stream(8), 4), loader(8)])
    trainer(FederatedStrategy(local_epochs=local_epochs), callbacks=[found]).fit(Plain(), clients)
    assert found.seen == {8.0}


def one_cycle(params: Any, total: int) -> Any:
    optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    schedule = OneCycleLR(optimizer, 0.1, total)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def test_a_schedule_made_for_the_steps_of_all_clients_is_warned_of() -> None:
    def fit(total: int, max_epochs: int = -1) -> None:
        module = Plain(make_optimizer=partial(one_cycle, total=total))
        trainer("fedavg", max_epochs, max_steps=24).fit(module, image_clients((8, 8, 8)))

    with pytest.warns(UserWarning, match=r"of all clients, \d+ in this round.*OneCycleLR.* fewer than the 24 that"):
        fit(24)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "max_steps")
        fit(8)
        fit(24, max_epochs=1)
