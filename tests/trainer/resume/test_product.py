"""Resuming is exact for each schedule, cohort, moment of saving, engine and algorithm."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau, StepLR

import lightning_fl as fl
from lightning_fl import FederatedStrategy
from tests.helpers.training import images, trainer, weights

pytestmark = [
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
    pytest.mark.filterwarnings("ignore:The tensors personal="),
    pytest.mark.filterwarnings("ignore:.*different numbers of batches"),
]
ROUNDS = 4


def plateau(monitor: str) -> Any:
    # It takes no value for an improvement, and so steps in every round.
    return lambda optimizer, module: {
        "scheduler": ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=1e9, threshold_mode="abs"),
        "monitor": monitor,
    }


SCHEDULES: dict[str, Any] = {
    "none": lambda optimizer, module: None,
    "by epoch": lambda optimizer, module: StepLR(optimizer, 1, 0.5),
    "by step": lambda optimizer, module: {"scheduler": StepLR(optimizer, 3, 0.8), "interval": "step"},
    "one cycle": lambda optimizer, module: {
        "scheduler": OneCycleLR(optimizer, 0.2, int(module.trainer.estimated_stepping_batches), cycle_momentum=False),
        "interval": "step",
    },
    "plateau of training": plateau("loss"),
    "plateau of validation": plateau("val_loss"),
}
COHORTS: dict[str, dict[str, Any]] = {
    "all": {},
    "share": {"clients_per_round": 0.5},
    # With this seed nobody takes part in the rounds 0 and 2.
    "poisson": {"cohort": fl.clients.Poisson(0.3), "seed": 94},
}
SAVED: dict[str, dict[str, Any]] = {
    "train epoch end": {"save_on_train_epoch_end": True},
    "validation end": {"save_on_train_epoch_end": False},
    "every n steps": {"every_n_train_steps": 5},
}
ENGINES = ("sequential", "vectorized")
ALGORITHMS = ("fedavg", "scaffold", "fedbn", "fedadam")


class WithBatchNorm(L.LightningModule):
    """A small network with BatchNorm and a schedule."""

    def __init__(self, schedule: str) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            layers = [nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 4)]
            self.net = nn.Sequential(*layers).double()
        self.schedule = schedule

    def loss(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0].double()), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        optimizer = SGD(self.parameters(), lr=0.1)
        schedule = SCHEDULES[self.schedule](optimizer, self)
        return optimizer if schedule is None else {"optimizer": optimizer, "lr_scheduler": schedule}


def fit(
    schedule: str, cohort: str, saved: str, engine: str, algorithm: str, folder: str, ckpt_path: Path | None = None
) -> tuple[L.Trainer, Tensor]:
    module = WithBatchNorm(schedule)
    datasets = [images(size, seed) for seed, size in enumerate((8, 4, 12, 8, 4, 16))]
    callbacks = [
        ModelCheckpoint(folder, filename="{epoch}-{step}", save_top_k=-1, **SAVED[saved]),
        EarlyStopping("loss", patience=100),
    ]
    run = trainer(
        FederatedStrategy(algorithm, engine=engine, **COHORTS[cohort]),
        ROUNDS,
        enable_checkpointing=True,
        callbacks=callbacks,
        num_sanity_val_steps=0,
    )
    data = fl.datamodules.ClientDatasets(datasets, val=images(16, 99), batch_size=4)
    run.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
    return run, weights(module)


def facts(run: L.Trainer) -> list[Any]:
    stopper = run.early_stopping_callback
    return [
        run.global_step,
        run.optimizers[0].param_groups[0]["lr"],
        {name: value.item() for name, value in run.callback_metrics.items() if "seconds" not in name},
        [entry["num_clients"] for entry in run.strategy.history],
        [config.scheduler.state_dict() for config in run.lr_scheduler_configs],
        (stopper.wait_count, stopper.best_score),
    ]


def check(cell: tuple[str, ...]) -> None:
    run, whole = fit(*cell, "whole")
    found = sorted(Path("whole").glob("*.ckpt"), key=lambda path: int(path.stem.split("=")[-1]))
    assert len(found) >= 2
    for path in found[:-1]:
        again, resumed = fit(*cell, "again", path)
        assert torch.equal(resumed, whole), path
        assert facts(again) == facts(run), path


PRODUCT = list(product(SCHEDULES, COHORTS, SAVED, ENGINES, ALGORITHMS))


@pytest.mark.slow
@pytest.mark.parametrize("cell", PRODUCT, ids="-".join)
def test_resuming_is_exact(cell: tuple[str, ...]) -> None:
    check(cell)
