"""Resuming is exact for each schedule, cohort, moment of saving, engine and algorithm."""

from __future__ import annotations

import warnings
from itertools import combinations, product
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


def check(cell: tuple[str, ...], last: int) -> None:
    run, whole = fit(*cell, "whole")
    found = sorted(Path("whole").glob("*.ckpt"), key=lambda path: int(path.stem.split("=")[-1]))
    assert len(found) >= 2
    for path in found[:last]:
        again, resumed = fit(*cell, "again", path)
        assert torch.equal(resumed, whole), path
        assert facts(again) == facts(run), path


PRODUCT = list(product(SCHEDULES, COHORTS, SAVED, ENGINES, ALGORITHMS))
COVERING = PRODUCT[14::13]


def pairs(cells: Any) -> set[Any]:
    return {two for cell in cells for two in combinations(enumerate(cell), 2)}


def test_the_smaller_product_has_every_pair() -> None:
    assert pairs(COVERING) == pairs(PRODUCT)


@pytest.mark.parametrize("cell", COVERING, ids="-".join)
@pytest.mark.spread(5)
def test_resuming_is_exact(cell: tuple[str, ...]) -> None:
    check(cell, 1)


@pytest.mark.slow
@pytest.mark.parametrize("cell", PRODUCT, ids="-".join)
def test_resuming_is_exact_in_every_combination(cell: tuple[str, ...]) -> None:
    check(cell, -1)


@pytest.mark.parametrize("saved", SAVED)
@pytest.mark.spread(1)
def test_without_the_metrics_a_plateau_schedule_resumes_with_another_rate(
    monkeypatch: pytest.MonkeyPatch, saved: str
) -> None:
    cell = ("plateau of validation", "all", saved, "sequential", "fedavg")
    run, _ = fit(*cell, "whole")
    monkeypatch.setattr("lightning_fl.strategies.loops.RoundFitLoop.end_resumed_round", lambda self: None)
    monkeypatch.setattr("lightning_fl.strategies.internals.restore_metrics", lambda *_: None)
    path = next(Path("whole").glob("epoch=0-*"))
    if saved == "validation end":
        with pytest.raises(RuntimeError, match="metric `loss` which is not available"):
            fit(*cell, "again", path)
    elif saved == "train epoch end":
        assert facts(fit(*cell, "again", path)[0])[1] == 2 * facts(run)[1]


@pytest.mark.slow
def test_a_schedule_that_monitors_a_metric_keeps_its_frequency(monkeypatch: pytest.MonkeyPatch) -> None:
    every_other = lambda optimizer, module: {**plateau("loss")(optimizer, module), "frequency": 2}  # noqa: E731
    monkeypatch.setitem(SCHEDULES, "every other", every_other)
    for saved in SAVED:
        cell = ("every other", "all", saved, "sequential", "fedavg")
        run, _ = fit(*cell, saved)
        assert facts(run)[1] == pytest.approx(0.1 / 2)  # the first value is an improvement
        for path in sorted(Path(saved).glob("*.ckpt"))[:-1]:
            assert facts(fit(*cell, "again", path)[0]) == facts(run), path


def first_rounds(monitor: str, **options: Any) -> L.Trainer:
    run = trainer(
        FederatedStrategy(**COHORTS["poisson"]),
        ROUNDS,
        callbacks=[EarlyStopping(monitor, patience=1, min_delta=100.0)],
        num_sanity_val_steps=0,
        **options,
    )
    datasets = [images(8, seed) for seed in range(6)]
    run.fit(
        WithBatchNorm(f"plateau of {'training' if monitor == 'loss' else 'validation'}"),
        fl.datamodules.ClientDatasets(datasets, val=images(16, 99), batch_size=4),
    )
    return run


def test_a_round_that_measured_nothing_asks_no_monitor(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        run = first_rounds("loss")
    assert [entry["num_clients"] for entry in run.strategy.history] == [0, 2, 0, 3]
    # The rounds 1 and 3 count; the round 2 would count the value of round 1 once more.
    assert run.early_stopping_callback.wait_count == 1
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1 / 2)
    lines = [line for line in caplog.messages if "not consulted" in line]
    assert lines == [
        f"Round {index}: {judge} is not consulted, because no client took part and 'loss' was not measured."
        for index in (0, 2)
        for judge in ("EarlyStopping", "ReduceLROnPlateau")
    ]


def test_what_validation_measures_counts_in_a_round_without_clients() -> None:
    run = first_rounds("val_loss")
    assert run.early_stopping_callback.wait_count == 1
    assert run.current_epoch == 2


def test_a_metric_that_nobody_logs_is_still_an_error() -> None:
    with pytest.raises(RuntimeError, match="metric `typo` which is not available"):
        trainer("fedavg", callbacks=[EarlyStopping("typo")]).fit(
            WithBatchNorm("none"), fl.datamodules.ClientDatasets([images(8)], val=images(8), batch_size=4)
        )


class ConfiguresLate(WithBatchNorm):
    """Makes its layers in ``configure_model``, and asks for the number of steps before that."""

    def setup(self, stage: str) -> None:
        self.net, self.layers = nn.Identity(), self.net
        self.steps = self.trainer.estimated_stepping_batches

    def configure_model(self) -> None:
        self.net = self.layers


@pytest.mark.parametrize("kind", [WithBatchNorm, ConfiguresLate])
def test_what_clients_keep_is_known_however_early_the_number_of_steps_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, kind: type[WithBatchNorm]
) -> None:
    monkeypatch.setattr("tests.trainer.resume.test_product.WithBatchNorm", kind)
    run, _ = fit("one cycle", "all", "train epoch end", "sequential", "fedbn", "whole")
    assert run.strategy.active_driver.sticky
    assert len(run.strategy.active_driver.store) == 6
    assert len(list(Path("whole/client_states").glob("manifests/*"))) == ROUNDS


def fit_on_rank(folder: str) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The tensors personal=")
        return fit("one cycle", "share", "train epoch end", "sequential", "fedbn", folder)[1]


def test_personal_tensors_stay_at_home_on_two_ranks(run_ranks: Any, tmp_path: Path) -> None:
    alone = fit_on_rank(str(tmp_path / "alone"))
    for found in run_ranks(2, fit_on_rank, str(tmp_path / "ranks")):
        torch.testing.assert_close(found, alone, rtol=1e-9, atol=1e-11)
