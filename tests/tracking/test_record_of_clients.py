"""What a run's record and its page hold of clients, privacy and hyper-parameters, from real runs."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import pytest
from lightning.pytorch.loggers import TensorBoardLogger

import lightning_fl as fl
from lightning_fl import FederatedStrategy
from lightning_fl.callbacks import PersonalizedEvaluation, RunRecord
from lightning_fl.tracking import Run, report
from lightning_fl.tracking.report import render
from tests.helpers.training import Plain, image_clients, loader, trainer


class Measured(Plain):
    def __init__(self, lr: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()

    def validation_step(self, batch: list, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))


@pytest.mark.parametrize("every_n_rounds", [1, None])
def test_the_record_holds_what_callbacks_after_it_measure_of_each_client(every_n_rounds: int | None) -> None:
    own = {client: loader(4) for client in range(2)}
    evaluation = PersonalizedEvaluation(own, finetune_epochs=1, local_epochs=0, every_n_rounds=every_n_rounds)
    trainer("fedavg", 2, callbacks=[RunRecord("run"), evaluation]).fit(Measured(), image_clients((4, 8), validate=True))
    found = Run.read("run")
    rounds, values = found.metric("personalized/val_loss")
    assert rounds == ([1, 2] if every_n_rounds else [2])
    assert values[-1] == pytest.approx(evaluation.means()["personalized/val_loss"])
    rows = {(row["client"], row["model"]): row["metrics"] for row in found.client_evaluations}
    assert rows == {(client, model): evaluation.metrics[client][model] for client, model in rows}
    assert set(rows) == {(client, model) for client in (0, 1) for model in ("global", "personalized")}
    page = render(found)
    assert "personalized/val_loss in the last round" in page
    assert "On each client's validation data" in page
    assert "mean val_loss" in page


def test_a_round_has_only_what_it_has_measured() -> None:
    run = trainer("fedavg", 4, callbacks=[RunRecord("run")], check_val_every_n_epoch=2)
    run.fit(Measured(), image_clients((4, 8), validate=True))
    assert Run.read("run").metric("val_loss")[0] == [2, 4]


def test_tensorboard_shows_the_settings_among_the_hyper_parameters() -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    metadata = pytest.importorskip("tensorboard.plugins.hparams.metadata")
    logger = TensorBoardLogger(".", name="", version="")
    run = trainer("fedprox", callbacks=[RunRecord()], logger=logger)
    run.fit(Measured(lr=0.25), image_clients((4, 8), validate=True))
    assert run.enable_autolog_hparams
    events = accumulator.EventAccumulator(logger.log_dir)
    events.Reload()
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    shown = metadata.parse_session_start_info_plugin_data(content).hparams
    assert shown["lr"].number_value == 0.25
    assert shown["fl/algorithm.mu"].number_value == 0.01
    assert shown["fl/num_clients"].number_value == 2
    (outcome,) = {scalar.value for scalar in events.Scalars("hp_metric") if scalar.step}
    assert outcome == pytest.approx(float(run.callback_metrics["val_loss"]))
    assert "fl/algorithm.mu: 0.01" in Path(logger.log_dir, "hparams.yaml").read_text(encoding="utf-8")


def test_a_failed_start_leaves_the_trainer_as_it_was() -> None:
    class Fails(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            raise RuntimeError("no")

    run = trainer("fedavg", callbacks=[Fails(), RunRecord("run")])
    with pytest.raises(RuntimeError, match="no"):
        run.fit(Plain(), image_clients((4, 8)))
    assert run.enable_autolog_hparams


def test_the_page_of_a_private_run_says_where_its_time_went(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "LEAST_SECONDS", 0.0)
    privacy = fl.privacy.ClientLevelDP(clip=1.0, noise_multiplier=1.0, delta=1e-3)
    strategy = FederatedStrategy("fedavg", num_clients=4, transforms=[privacy])
    trainer(strategy, 2, callbacks=[RunRecord("run")]).fit(Plain(), loader(32, 8))
    page = render(Run.read("run"))
    for shown in ("clip, noise, epsilon, compression", "adversary", "delta", "spent up to each round", "<td>yes</td>"):
        assert shown in page
    assert "spread of the updates" not in page  # noise makes it a number without a meaning
    assert strategy.history[-1]["seconds"]["transform"] > 0
