"""Loggers and progress bars show what a plain Trainer's would."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger

import lightning_fl as fl
from lightning_fl import FederatedStrategy
from lightning_fl.datamodules import ClientLoaders
from tests.helpers.training import Ordinary, Plain, image_clients, loader, measured, trainer, weights

CLIENT = fl.datamodules.ClientLoaders([loader()]), loader(8, seed=9)
LOGGED = ("val_loss", "val_acc", "train_acc", "loss_epoch")


def train(strategy: Any, *data: Any, **options: Any) -> tuple[torch.Tensor, L.Trainer]:
    module = Ordinary(torch.float64)
    run = trainer(strategy, **{"max_epochs": 2, "log_every_n_steps": 1, **options})
    run.fit(module, *data)
    return weights(module), run


def one_client(**options: Any) -> tuple[torch.Tensor, L.Trainer]:
    return train(FederatedStrategy(client_optimizer="keep"), *CLIENT, **options)


def epochs_in(path: Path) -> list[dict[str, float]]:
    with path.open() as file:
        rows = list(csv.DictReader(file))
    return [
        {key: float(row[key]) for key in ("step", *LOGGED) if row[key]} for row in rows if any(map(row.get, LOGGED))
    ]


def test_csv_rows_of_one_client_are_those_of_a_plain_trainer() -> None:
    one_client(logger=CSVLogger("federated"))
    train("auto", loader(), loader(8, seed=9), logger=CSVLogger("plain"))
    found, expected = (epochs_in(next(Path(name).rglob("metrics.csv"))) for name in ("federated", "plain"))
    assert len(found) == 4
    for row, plain in zip(found, expected, strict=True):
        assert row == pytest.approx(plain, rel=1e-6)


class ByStep(Plain):
    """Logs the same by step alone, and by step and epoch."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("by_step", loss)
        self.log("forked", loss, on_step=True, on_epoch=True)
        return loss


class Hooked(ByStep):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None: ...


def points(strategy: Any, module: Plain, data: Any, folder: str) -> tuple[list[tuple[str, ...]], dict[str, float]]:
    run = trainer(strategy, 2, log_every_n_steps=1, logger=CSVLogger(folder))
    run.fit(module, data)
    with next(Path(folder).rglob("metrics.csv")).open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["by_step"]]
    assert all(row["by_step"] == row["forked_step"] for row in rows)
    return [(row["step"], row["by_step"]) for row in rows], measured(run)


@pytest.mark.parametrize("module", [ByStep, Hooked])
def test_the_curve_by_step_is_that_of_the_batches(module: type[Plain]) -> None:
    found, metrics = points(FederatedStrategy(client_optimizer="keep"), module(), ClientLoaders([loader()]), "one")
    expected, plain = points("auto", module(), loader(), "plain")
    assert [step for step, _ in found] == [step for step, _ in expected]
    assert [float(value) for _, value in found] == pytest.approx([float(value) for _, value in expected], rel=1e-6)
    assert {name: metrics[name] for name in plain} == pytest.approx(plain, rel=1e-6)
    clients = ClientLoaders([loader(), loader()])
    both, of_both = points(FederatedStrategy("fedavg", engine="sequential"), module(), clients, "two")
    first = [float(value) for _, value in expected[: len(expected) // 2]]
    assert [float(value) for _, value in both[: 2 * len(first)]] == pytest.approx(2 * first, rel=1e-6)
    assert of_both["by_step"] == of_both["forked"]  # what callbacks monitor is the cohort's mean, on every rank


def log_on_ranks(directory: str) -> list[bool]:
    strategy = FederatedStrategy(clients_per_round=1, client_optimizer="keep", seed=4)
    trained: list[bool] = []

    class Watch(L.Callback):
        def on_train_epoch_start(self, *_: Any) -> None:
            trained.append(bool(strategy.active_driver.plan.clients))

    clients = image_clients((1, 7, 23), validate=True)
    train(strategy, clients, logger=CSVLogger(directory), callbacks=[Watch()], max_epochs=4)
    return trained


def test_the_first_rank_logs_whether_it_trains_or_not(run_ranks: Any, tmp_path: Path) -> None:
    log_on_ranks(str(tmp_path / "alone"))
    trained, _ = run_ranks(2, log_on_ranks, str(tmp_path / "two"))
    assert set(trained) == {True, False}
    alone, two = (epochs_in(next((tmp_path / name).rglob("metrics.csv"))) for name in ("alone", "two"))
    assert len(two) == 8
    for row, expected in zip(two, alone, strict=True):
        assert row == pytest.approx(expected, rel=1e-6)


def test_tensorboard() -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, run = one_client(logger=TensorBoardLogger("."))
    events = EventAccumulator(run.logger.log_dir).Reload()
    assert {*LOGGED, "loss_step", "epoch"} <= set(events.Tags()["scalars"])
    last = {name: events.Scalars(name)[-1] for name in LOGGED}
    assert {event.step for event in last.values()} == {11}
    for name, event in last.items():
        assert event.value == pytest.approx(run.callback_metrics[name].item(), rel=1e-5)


@pytest.mark.slow
def test_weights_and_biases_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_MODE", "offline")
    logger = WandbLogger(offline=True, save_dir=".")
    _, run = one_client(logger=logger)
    summary = dict(logger.experiment.summary)
    logger.experiment.finish()
    wandb.teardown()
    assert summary["trainer/global_step"] == 11
    for name in LOGGED:
        assert summary[name] == pytest.approx(run.callback_metrics[name].item(), rel=1e-5)


class Totals(TQDMProgressBar):
    """Notes each round's length."""

    def on_train_epoch_start(self, trainer: Any, *args: Any) -> None:
        super().on_train_epoch_start(trainer, *args)
        self.totals = [*getattr(self, "totals", []), self.total_train_batches]


@pytest.mark.parametrize("make", [TQDMProgressBar, RichProgressBar])
def test_progress_bars_change_nothing(make: type[ProgressBar], capsys: pytest.CaptureFixture[str]) -> None:
    clients = image_clients((3, 9, 17), validate=True)
    strategy = {"clients_per_round": 2}
    without, _ = train(FederatedStrategy(**strategy), clients)
    shown, _ = train(FederatedStrategy(**strategy), clients, enable_progress_bar=True, callbacks=[make()])
    assert torch.equal(shown, without)
    assert "Epoch 1" in "".join(capsys.readouterr())


def test_the_progress_bar_knows_each_rounds_length() -> None:
    bar = Totals()
    _, run = train(
        FederatedStrategy(clients_per_round=1),
        image_clients((3, 9, 17), validate=True),
        callbacks=[bar],
        enable_progress_bar=True,
    )
    assert bar.totals == [entry["num_steps"] for entry in run.strategy.history]
