"""Batches and loaders that do not fit a client, and settings that have nothing to act on."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import MeanMetric

import lightning_fl as fl
from tests.helpers.training import Ordinary, Plain, images, trainer, weights


class Normed(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.BatchNorm1d(4))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = nn.functional.cross_entropy(self.net(x), y)
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class LooksAtBatches(Callback):
    def on_train_batch_end(self, *args: Any) -> None: ...


def clients(sizes: tuple[int, ...]) -> fl.datamodules.ClientDatasets:
    return fl.datamodules.ClientDatasets([images(size, seed) for seed, size in enumerate(sizes)], batch_size=2)


@pytest.mark.parametrize("callbacks", [[], [LooksAtBatches()]], ids=["tight", "hooked"])
@pytest.mark.parametrize("engine", ["sequential", "auto"])
@pytest.mark.parametrize("sizes", [(4, 3, 4), (3, 4), (4, 1, 6)], ids=str)
@pytest.mark.spread(4)
def test_a_batch_of_one_under_batch_norm_names_its_client_or_leaves_it_out(
    sizes: tuple[int, ...], engine: str, callbacks: list[Callback]
) -> None:
    odd = next(client for client, size in enumerate(sizes) if size % 2)
    with pytest.raises(ValueError, match=rf"client {odd} .*batch of one example.*drop_last=True"):
        trainer(fl.FederatedStrategy(engine=engine), callbacks=callbacks).fit(Normed(), clients(sizes))
    module, own = Normed(), trainer(fl.FederatedStrategy(engine=engine, on_client_error="skip"), 2, callbacks=callbacks)
    with pytest.warns(UserWarning, match=f"client {odd} .*left out"):
        own.fit(module, clients(sizes))
    # As if it were not there, which a federation without it shows.
    without = {client: images(size, client) for client, size in enumerate(sizes) if client != odd}
    expected, other = Normed(), trainer(fl.FederatedStrategy(engine=engine), 2)
    other.fit(expected, fl.datamodules.ClientDatasets(without, batch_size=2))
    torch.testing.assert_close(weights(module), weights(expected), rtol=1e-5, atol=1e-6)
    assert own.callback_metrics["loss"] == pytest.approx(other.callback_metrics["loss"].item())


@pytest.mark.parametrize(
    "make",
    [
        lambda loader: {"a": loader, "b": loader},
        lambda loader: [loader, loader],
        lambda loader: CombinedLoader([loader, loader], "min_size"),
    ],
    ids=["dict", "list", "combined"],
)
def test_several_loaders_of_one_client_are_refused_in_a_sentence(make: Any) -> None:
    loaders = fl.datamodules.ClientLoaders({"north": lambda: make(DataLoader(images(4), 2))})
    with pytest.raises(ValueError, match=r"client 'north' is a \w+ of loaders, but a client has one.*ConcatDataset"):
        trainer().fit(Plain(), loaders)


@pytest.mark.parametrize(
    "options", [{"val_check_interval": 0.5}, {"val_check_interval": 100, "check_val_every_n_epoch": None}], ids=str
)
def test_a_validation_interval_is_accepted_where_nothing_is_validated(options: dict[str, Any]) -> None:
    trainer(max_epochs=2, **options).fit(Plain(), clients((4, 4)))
    validated = fl.datamodules.ClientDatasets([images(4)], val=images(4))
    with pytest.raises(MisconfigurationException, match="inside a round"):
        trainer(**options).fit(Ordinary(), validated)


class Logging(Plain):
    """Logs in a hook that every rank runs, and a metric by step."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = MeanMetric()

    def on_train_epoch_start(self) -> None:
        for reduction in ("sum", "mean", "max"):
            self.log(f"start_{reduction}", 3.0, reduce_fx=reduction)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.mean(batch[0].mean())
        self.log("by_step", self.mean, on_step=True)
        self.log("by_both", self.mean, on_step=True, on_epoch=True)
        return super().training_step(batch, batch_idx)


def logged(engine: str) -> dict[str, float]:
    own = trainer(fl.FederatedStrategy(engine=engine), 2)
    own.fit(Logging(), clients((2, 7, 5)))
    return {name: value.item() for name, value in own.callback_metrics.items()}


@pytest.mark.parametrize("engine", ["sequential", "auto"])
def test_logged_values_are_the_same_on_any_number_of_ranks(run_ranks: Any, engine: str) -> None:
    (alone,) = run_ranks(1, logged, engine)
    assert [alone[f"start_{reduction}"] for reduction in ("sum", "mean", "max")] == [3.0] * 3
    means = [batch.mean() for data in clients((2, 7, 5))._train.values() for batch in data.tensors[0].split(2)]
    assert alone["by_step"] == alone["by_both"] != 0
    assert len(means) == 8
    for other in run_ranks(2, logged, engine):
        assert other == pytest.approx(alone)
