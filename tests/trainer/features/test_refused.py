"""What a federation can't do is refused, and the message says what to do instead."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import SGD
from torch.optim.lr_scheduler import ReduceLROnPlateau

from tests.helpers.training import Ordinary, Plain, image_clients, loader, trainer


class Tunable(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.lr = 0.1
        self.batch_size = 2

    def train_dataloader(self) -> Any:
        return loader(batch_size=self.batch_size)


TUNINGS: dict[str, Callable[[L.LightningModule], Any]] = {
    "lr_find": lambda module: Tuner(trainer("fedavg")).lr_find(module),
    "scale_batch_size": lambda module: Tuner(trainer("fedavg")).scale_batch_size(module),
    "LearningRateFinder": lambda module: trainer("fedavg", callbacks=[LearningRateFinder()]).fit(module),
    "BatchSizeFinder": lambda module: trainer("fedavg", callbacks=[BatchSizeFinder()]).fit(module),
}


@pytest.mark.parametrize("name", TUNINGS)
def test_tuners(name: str) -> None:
    with pytest.raises(MisconfigurationException, match=r"has no rounds\. Tune with strategy='auto'"):
        TUNINGS[name](Tunable())


def test_batchnorm_over_several_processes() -> None:
    with pytest.raises(MisconfigurationException, match=r"sync_batchnorm=True\) would be ignored"):
        trainer("fedavg", sync_batchnorm=True).fit(Plain(), image_clients())


class PlateauByStep(Ordinary):
    def configure_optimizers(self) -> Any:
        optimizer = SGD(self.parameters(), lr=0.1)
        schedule = {"scheduler": ReduceLROnPlateau(optimizer), "monitor": "val_loss", "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}


def test_a_plateau_schedule_by_step() -> None:
    with pytest.raises(MisconfigurationException, match="Use interval='epoch', which is a round"):
        trainer("fedavg").fit(PlateauByStep(), image_clients(validate=True))


@pytest.mark.parametrize(
    "options",
    [
        {"val_check_interval": 0.5},
        {"val_check_interval": 3},
        {"val_check_interval": timedelta(minutes=1)},
        {"check_val_every_n_epoch": None, "val_check_interval": 3},
        {"check_val_every_n_epoch": None, "val_check_interval": timedelta(minutes=1)},
    ],
    ids=str,
)
def test_validation_inside_a_round(options: dict[str, Any]) -> None:
    with pytest.raises(MisconfigurationException, match="use check_val_every_n_epoch, which counts rounds"):
        trainer("fedavg", **options).fit(Ordinary(), image_clients(validate=True))
