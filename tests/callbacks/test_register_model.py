"""MLflow's registry, in a database of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import MLFlowLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import lightning_fl as fl
from lightning_fl.callbacks import RegisterModel
from tests.helpers.training import Plain, image_clients, trainer


class Scored(Plain):
    """Logs a given score in each round."""

    def __init__(self, scores: list[float]) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.scores = scores

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_acc", self.scores[self.trainer.current_epoch], batch_size=len(batch[0]))


def logger() -> MLFlowLogger:
    return MLFlowLogger(
        "digits", tracking_uri="sqlite:///mlflow.db", artifact_location=str(Path("artifacts").absolute())
    )


@pytest.mark.slow  # MLflow takes 10 seconds to make its database
@pytest.mark.filterwarnings("ignore:The tensors personal=", "ignore:The ``noload`` loader strategy is deprecated")
def test_the_alias_moves_to_a_better_model_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///mlflow.db")  # MLflow sets it
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")

    def register(scores: list[float], *callbacks: Any) -> tuple[Any, Scored]:
        own = logger()
        module = Scored(scores)
        fit = trainer(
            fl.FederatedStrategy("fedprox", personal=("net.3.bias",)),
            len(scores),
            logger=own,
            callbacks=[RegisterModel("digits"), *callbacks],
            enable_checkpointing=bool(callbacks),
            num_sanity_val_steps=0,
        )
        fit.fit(module, image_clients(validate=True))
        return own.experiment, module

    client, module = register([0.25, 0.5])
    champion = client.get_model_version_by_alias("digits", "champion")
    expected = {"val_acc": "0.5", "rounds": "2", "algorithm": "FedProx(mu=0.01, server_lr=1.0)"}
    assert (str(champion.version), champion.tags) == ("1", expected)
    assert client.get_metric_history(champion.run_id, "val_acc")[-1].value == 0.5
    (path,) = Path("artifacts").rglob("model.ckpt")
    assert champion.source.endswith("model")
    content = torch.load(path, weights_only=True)
    assert not {"lightning_fl", "callbacks", "loops", "optimizer_states"} & content.keys()  # no client's, no counts
    loaded = Scored.load_from_checkpoint(path)
    for name, value in module.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value, rtol=0, atol=0)
    register([0.5])  # as good is not better
    register([float("nan")])
    assert str(client.get_model_version_by_alias("digits", "champion").version) == "1"
    best = ModelCheckpoint("best", monitor="val_acc", mode="max")
    register([0.75, 0.1], best)  # the best round's model, not the last one's
    champion = client.get_model_version_by_alias("digits", "champion")
    assert (str(champion.version), champion.tags["val_acc"], champion.tags["rounds"]) == ("4", "0.75", "1")
    assert len(client.search_model_versions("name = 'digits'")) == 4


def test_wrong_settings_are_refused_before_training() -> None:
    with pytest.raises(MisconfigurationException, match="needs an MLFlowLogger"):
        trainer("fedavg", callbacks=[RegisterModel("digits")]).fit(Plain(), image_clients())
    with pytest.raises(ValueError, match="'auto', 'max' or 'min'"):
        RegisterModel("digits", mode="best")
    with pytest.raises(MisconfigurationException, match=r"more of 'val_x' is better or less\. Give it mode='max'"):
        trainer("fedavg", callbacks=[RegisterModel("digits", if_better="val_x")]).fit(Plain(), image_clients())
