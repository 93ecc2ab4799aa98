"""Loaders, and evaluation after training: as with a plain Trainer."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

import lightning_fl as fl
from lightning_fl import FederatedStrategy
from tests.helpers.training import Ordinary, Plain, loader, trainer, weights


def test_several_validation_loaders() -> None:
    class Several(Ordinary):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            super().validation_step(batch, batch_idx)

    metrics = []
    for strategy, data in (
        (FederatedStrategy(client_optimizer="keep"), fl.datamodules.ClientLoaders([loader()])),
        ("auto", loader()),
    ):
        run = trainer(strategy, 2)
        run.fit(Several(torch.float64), data, [loader(8, seed=9), loader(10, seed=10)])
        metrics.append({name: value.item() for name, value in run.callback_metrics.items() if "dataloader" in name})
    assert len(metrics[0]) == 4
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-6)


@pytest.mark.parametrize("shuffle", [False, True])
def test_loader_workers_change_nothing(shuffle: bool) -> None:
    def train(num_workers: int) -> Tensor:
        module = Plain()
        data = loader(8, num_workers=num_workers, shuffle=shuffle)
        trainer(FederatedStrategy(num_clients=2)).fit(module, data)
        return weights(module)

    assert torch.equal(train(1), train(0))


class Reloaded(L.LightningDataModule):
    """Gives other data each time it is asked."""

    def __init__(self, federated: bool) -> None:
        super().__init__()
        self.federated = federated
        self.num_asked = 0

    def train_dataloader(self) -> Any:
        self.num_asked += 1
        data = loader(8 + 4 * self.num_asked, seed=self.num_asked)
        return fl.datamodules.ClientLoaders([data]) if self.federated else data


def test_loaders_that_are_made_anew_each_epoch() -> None:
    outcomes = []
    for strategy in (FederatedStrategy(client_optimizer="keep"), "auto"):
        module, data = Plain(), Reloaded(strategy != "auto")
        run = trainer(strategy, 3, reload_dataloaders_every_n_epochs=1)
        run.fit(module, datamodule=data)
        assert data.num_asked == 3
        outcomes.append((weights(module), run.global_step))
    torch.testing.assert_close(outcomes[0][0], outcomes[1][0], rtol=1e-10, atol=1e-12)
    assert outcomes[0][1] == outcomes[1][1] == 3 + 4 + 5


class Evaluated(Ordinary):
    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", nn.functional.cross_entropy(self.net(batch[0].double()), batch[1]))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch[0].double())


def test_evaluation_after_fit_and_a_second_fit() -> None:
    def run(strategy: Any, data: Any) -> tuple[Tensor, Any, Tensor, int]:
        module = Evaluated(torch.float64)
        again = trainer(strategy, 1)
        module.configure_optimizers = lambda: SGD(module.parameters(), lr=0.1)  # type: ignore[method-assign]
        again.fit(module, data, loader(8, seed=9))
        metrics = again.validate(module, loader(8, seed=9), verbose=False)
        metrics += again.test(module, loader(6, seed=8), verbose=False)
        predicted = torch.cat(again.predict(module, loader(6, seed=8)))
        again.fit_loop.max_epochs = 3
        again.fit(module, data, loader(8, seed=9))
        return weights(module), metrics, predicted, again.global_step

    found, expected = run("fedavg", fl.datamodules.ClientLoaders([loader()])), run("auto", loader())
    for value, plain in zip(found[::2], expected[::2], strict=True):
        torch.testing.assert_close(value, plain, rtol=1e-9, atol=1e-11)
    for metrics, plain_metrics in zip(found[1], expected[1], strict=True):
        assert metrics == pytest.approx(plain_metrics, rel=1e-6)
    assert found[3] == expected[3]
