"""Logging beyond Lightning's metrics: settings, the partition, and metrics with the round as x-axis."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger

from lightning_fl.tracking import plots
from lightning_fl.tracking.partition import PartitionSummary
from lightning_fl.tracking.run import as_number
from lightning_fl.tracking.silo_logger import SiloWandbLogger
from lightning_fl.tracking.tables import markdown_table

MAX_TABLE_ROWS = 1000


def _writing(trainer: L.Trainer) -> list[Any]:
    """The loggers that are active on this rank."""
    return [logger for logger in trainer.loggers if trainer.is_global_zero or isinstance(logger, SiloWandbLogger)]


def log_settings(trainer: L.Trainer, settings: Mapping[str, str], own: Mapping[str, Any]) -> None:
    """Logs the strategy's settings as hyper-parameters, under ``fl/``, together with those of module and datamodule.

    In a single call, because TensorBoard shows only the first hyper-parameters that a run logs.

    Args:
        trainer: The Trainer.
        settings: The settings.
        own: The hyper-parameters of module and datamodule, unless Lightning logs them itself.
    """
    for logger in _writing(trainer):
        logger.log_hyperparams({**own, **{f"fl/{name}": as_number(value) for name, value in settings.items()}})
        logger.log_graph(trainer.lightning_module)
        logger.save()
        if isinstance(logger, TensorBoardLogger):
            rows = [[name, str(value)] for name, value in settings.items()]
            logger.experiment.add_text("fl/settings", markdown_table(["setting", "value"], rows))


def log_partition(trainer: L.Trainer, summary: PartitionSummary) -> None:
    """Logs the partition to TensorBoard and W&B: a table, and a plot if matplotlib is installed."""
    columns = ["client", "examples", *summary.labels]
    rows = [
        [str(client), size, *(summary.counts[row] if len(summary.counts) else ())]
        for row, (client, size) in enumerate(zip(summary.ids, summary.sizes, strict=True))
    ]
    log_table(trainer, "fl/partition_table", columns, rows)
    for logger in _writing(trainer):
        if plots.is_available() and isinstance(logger, TensorBoardLogger):
            logger.experiment.add_figure("fl/partition", plots.partition_figure(summary), 0)
        elif plots.is_available() and isinstance(logger, WandbLogger):
            from PIL import Image

            picture = Image.open(io.BytesIO(plots.as_png(plots.partition_figure(summary))))
            logger.log_image("fl/partition", [picture])


def log_table(trainer: L.Trainer, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Logs a table of at most 1,000 rows to TensorBoard and W&B."""
    rows = rows[:MAX_TABLE_ROWS]
    for logger in _writing(trainer):
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text(name, markdown_table(columns, rows), trainer.current_epoch)
        elif isinstance(logger, WandbLogger):
            logger.log_table(name, columns=list(columns), data=[list(row) for row in rows])


def log_by_round(trainer: L.Trainer, round: int, metrics: Mapping[str, float]) -> None:
    """Logs a round's metrics again to TensorBoard and W&B, with the round, counted from 1, as x-axis."""
    # Lightning's x-axis is global_step, in which runs with different amounts of local work can't be compared.
    for logger in _writing(trainer):
        if isinstance(logger, TensorBoardLogger):
            for name, value in metrics.items():
                logger.experiment.add_scalar(f"round/{name}", value, round + 1)
        elif isinstance(logger, WandbLogger):
            logger.experiment.define_metric("round/*", step_metric="round/number")
            logger.experiment.log({"round/number": round + 1, **{f"round/{key}": metrics[key] for key in metrics}})


def log_outcome(trainer: L.Trainer, value: float) -> None:
    """Logs a run's last headline metric beside its settings in TensorBoard, unless the module logs one itself."""
    for logger in _writing(trainer):
        if isinstance(logger, TensorBoardLogger) and "hp_metric" not in trainer.callback_metrics:
            logger.log_metrics({"hp_metric": value}, trainer.global_step)
            logger.save()


def log_own_silo(trainer: L.Trainer, row: Mapping[str, Any]) -> None:
    """Logs this silo's own metrics, under ``silo/``, to the loggers that write one run per silo."""
    for logger in _writing(trainer):
        if isinstance(logger, SiloWandbLogger):
            logger.log_metrics({f"silo/{name}": value for name, value in row.items() if isinstance(value, float)})
