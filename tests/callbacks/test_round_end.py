"""What is recorded and shown of a round: all that was logged in it, and nothing of an earlier one."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from rich.console import Console

from lightning_fl.callbacks import Alerts, FederatedProgressBar, Prometheus, RunRecord
from lightning_fl.tracking import Run
from tests.helpers.training import Plain, image_clients, trainer

EPOCHS = pytest.mark.parametrize("strategy", ["fedavg", "auto"])


class LogsLast(Plain):
    """Logs the number of the round in its own hook at the epoch's end, which Lightning calls after the callbacks'."""

    def on_train_epoch_end(self) -> None:
        self.log("last", float(self.trainer.current_epoch + 1), prog_bar=True)


@EPOCHS
def test_what_the_module_logs_at_the_epochs_end_belongs_to_that_round(strategy: str) -> None:
    pytest.importorskip("prometheus_client")
    told: list[tuple[int, float | None]] = []
    text, scraped = io.StringIO(), Prometheus(port=0)
    alerts = Alerts(["last >= 2"], lambda alert: told.append((alert.round, alert.value)))
    bar = FederatedProgressBar(console=Console(file=text, width=200))
    callbacks = [bar, RunRecord("run"), alerts, scraped, ModelCheckpoint("saved", save_top_k=-1, filename="{epoch}")]
    fit = trainer(strategy, 3, callbacks=callbacks, enable_checkpointing=True, enable_progress_bar=True)
    fit.fit(LogsLast(), image_clients())
    assert Run.read("run").metric("last") == ([1, 2, 3], [1.0, 2.0, 3.0])
    assert told == [(2, 2.0)]
    assert [line.split()[-1] for line in text.getvalue().splitlines() if line.startswith("round ")] == ["1", "2", "3"]
    (shown,) = [own for own in scraped.registry.collect() if own.name == "lightning_fl_metric"]
    assert {own.labels["name"]: own.value for own in shown.samples}["last"] == 3.0
    for epoch in range(3):  # a checkpoint has the row of its own round
        saved = torch.load(f"saved/epoch={epoch}.ckpt", weights_only=True)["callbacks"]["RunRecord"]["rows"]
        assert [row["metrics"]["last"] for row in json.loads(saved)["rows"]] == [1.0, 2.0, 3.0][: epoch + 1]
    assert not any("on_round_end" in own.state_key for own in fit.callbacks)  # type: ignore[attr-defined]


class Validated(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("train_loss", loss, on_step=True, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_acc", 0.5, batch_size=len(batch[0]))


@EPOCHS
def test_a_value_of_an_earlier_round_does_not_count_again(strategy: str) -> None:
    told: list[int] = []
    rules = ["val_acc < 0.8 for 2 rounds"] * 2  # a rule given twice is one
    callbacks = [
        Alerts(rules, lambda alert: told.append(alert.round)),
        RunRecord(),
        LearningRateMonitor(),
        # They read the metrics once more after the record has.
        EarlyStopping("val_acc", patience=9),
        ModelCheckpoint("saved", monitor="val_acc"),
    ]
    options: dict[str, Any] = {"check_val_every_n_epoch": 2, "num_sanity_val_steps": 0, "enable_checkpointing": True}
    fit = trainer(strategy, 5, callbacks=callbacks, logger=CSVLogger(".", name="run", version=0), **options)
    fit.fit(Validated(), image_clients(validate=True))
    found = Run.read("run")
    assert found.metric("val_acc") == ([2, 4], [0.5, 0.5])
    assert all({"train_loss", "lr-SGD"} <= row["metrics"].keys() for row in found.rounds)
    assert told == [4]


def test_a_second_run_begins_anew() -> None:
    told: list[int] = []
    alerts = Alerts(["fl/num_clients > 0"], lambda alert: told.append(alert.round))
    for _ in range(2):
        trainer("fedavg", 1, callbacks=[alerts]).fit(Plain(), image_clients())
    assert told == [1, 1]


class Fails(LogsLast):
    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        if self.trainer.current_epoch == 1 and not Path("failed").exists():
            Path("failed").touch()
            raise RuntimeError("the power failed")


def test_a_hook_of_the_module_that_raises_leaves_no_half_round() -> None:
    fit, module = trainer("fedavg", 3, callbacks=[RunRecord("run")]), Fails()
    with pytest.raises(RuntimeError, match="the power failed"):
        fit.fit(module, image_clients())
    assert [row["round"] for row in Run.read("run").rounds] == [0]
    assert [type(own).__name__ for own in fit.callbacks].count("_Turn") == 0  # type: ignore[attr-defined]
