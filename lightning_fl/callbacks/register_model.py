"""Registers a run's model in MLflow's model registry."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import MLFlowLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_fl.callbacks.monitored import mode_in
from lightning_fl.callbacks.run_record import MODEL_FILE, global_model
from lightning_fl.strategies import FederatedStrategy

FOLDER = "model"


class RegisterModel(L.Callback):
    """Registers the global model in MLflow when training ends, and moves an alias to it if it is better.

    If the Trainer's ``ModelCheckpoint`` monitors ``if_better``, its best model is registered, otherwise that of the
    last round. The version gets the metric, the rounds and the algorithm as tags. It is an ordinary checkpoint with
    weights and hyper-parameters that ``MyModule.load_from_checkpoint`` loads, without the server state, client tensors
    and exact counts of a training checkpoint.

    Args:
        name: Name of the registered model; it is created if it does not exist.
        alias: The alias of the best version. Default ``"champion"``.
        if_better: The metric by which versions are compared. None: the alias always moves. Default ``"val_acc"``.
        mode: ``"max"`` or ``"min"``; ``"auto"``, the default: as the Trainer's ``ModelCheckpoint`` monitors the metric,
            else by the words of its name.

    Raises:
        ValueError: If ``mode`` is unknown.
        MisconfigurationException: When training starts, if the Trainer has no ``MLFlowLogger``, or if ``mode`` is
            ``"auto"`` and unclear.

    Example:
        >>> register = RegisterModel("digits", if_better="val_acc")
    """

    def __init__(
        self, name: str, alias: str = "champion", if_better: str | None = "val_acc", mode: str = "auto"
    ) -> None:
        if mode not in ("auto", "max", "min"):
            raise ValueError(f"mode {mode!r} must be 'auto', 'max' or 'min'.")
        self.name = name
        self.alias = alias
        self.if_better = if_better
        self.mode = mode
        self._is_higher_better = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Checks that there is a logger and what is better, before hours of training."""
        mode = self.mode if self.mode != "auto" or self.if_better is None else mode_in(trainer, self.if_better)
        if mode is None:
            raise MisconfigurationException(
                f"RegisterModel does not know whether more of {self.if_better!r} is better or less. Give it mode='max' "
                "or mode='min'."
            )
        self._is_higher_better = mode == "max"
        if trainer.is_global_zero:
            _logger(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Registers the model."""
        if not trainer.is_global_zero:
            return
        model, value = self._choose(trainer)
        logger = _logger(trainer)
        client, run_id = logger.experiment, str(logger.run_id)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, MODEL_FILE)
            torch.save(model, path)
            client.log_artifact(run_id, str(path), FOLDER)
        source = f"{client.get_run(run_id).info.artifact_uri}/{FOLDER}"
        tags = {"rounds": str(model["epoch"])}
        if isinstance(trainer.strategy, FederatedStrategy):
            tags["algorithm"] = repr(trainer.strategy.algorithm)
        if self.if_better is not None and value is not None:
            tags[self.if_better] = repr(value)
        if not client.search_registered_models(f"name = '{self.name}'"):
            client.create_registered_model(self.name)
        champion = self._champion(client)
        version = client.create_model_version(self.name, source, run_id=run_id, tags=tags)
        is_champion = self._is_better(value, champion)
        if is_champion:
            client.set_registered_model_alias(self.name, self.alias, version.version)
        rank_zero_info(
            f"MLflow: {self.name} version {version.version}"
            + (f" is now {self.alias}." if is_champion else f"; version {champion.version} stays {self.alias}.")
        )

    def _choose(self, trainer: L.Trainer) -> tuple[dict[str, Any], float | None]:
        """The model, and the metric of that model."""
        model = global_model(trainer)
        for callback in trainer.checkpoint_callbacks:
            if not isinstance(callback, ModelCheckpoint) or callback.monitor is None or not callback.best_model_path:
                continue
            if callback.monitor == self.if_better and callback.best_model_score is not None:
                best = torch.load(callback.best_model_path, map_location="cpu", weights_only=True)
                own = {name: best[name] for name in model if name in best}
                # A checkpoint holds the index of its last round, from 0; `global_model` the number of rounds.
                return {**model, **own, "epoch": best["epoch"] + 1}, float(callback.best_model_score)
        value = trainer.callback_metrics.get(self.if_better or "")
        if value is None and self.if_better is not None:
            known = ", ".join(name for name in trainer.callback_metrics if not name.startswith("fl/"))
            rank_zero_warn(
                f"No metric {self.if_better!r} was logged, so the new version can't be compared with {self.alias}; the "
                f"logged metrics are {known or 'none'}. The model is registered without the alias."
            )
        return model, None if value is None else float(value)

    def _champion(self, client: Any) -> Any:
        """The version that currently has the alias."""
        if self.alias not in client.get_registered_model(self.name).aliases:
            return None
        return client.get_model_version_by_alias(self.name, self.alias)

    def _is_better(self, value: float | None, champion: Any) -> bool:
        if self.if_better is None:
            return True
        if value is None or not math.isfinite(value):
            return False
        other = float(champion.tags.get(self.if_better, "nan")) if champion is not None else math.nan
        if not math.isfinite(other):
            return True
        return value > other if self._is_higher_better else value < other


def _logger(trainer: L.Trainer) -> MLFlowLogger:
    found = next((logger for logger in trainer.loggers if isinstance(logger, MLFlowLogger)), None)
    if found is None:
        raise MisconfigurationException(
            "RegisterModel needs an MLFlowLogger, such as MLFlowLogger(tracking_uri='sqlite:///mlflow.db'). Give the "
            "Trainer one."
        )
    return found
