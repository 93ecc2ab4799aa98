"""In which direction a metric gets better, as the Trainer's own callbacks say."""

from __future__ import annotations

from typing import cast

import lightning as L
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from lightning_fl.tracking.metrics import Mode, mode_of_name


def monitored_modes(trainer: L.Trainer) -> dict[str, Mode]:
    """The modes of the metrics that checkpoints and early stopping monitor; of a metric with two, the checkpoint's."""
    own = trainer.callbacks  # type: ignore[attr-defined]
    found: dict[str, Mode] = {}
    for kind in (EarlyStopping, ModelCheckpoint):
        found.update({each.monitor: cast(Mode, each.mode) for each in own if isinstance(each, kind) and each.monitor})
    return found


def mode_in(trainer: L.Trainer, metric: str) -> Mode | None:
    """The direction in which a metric gets better: as the Trainer's callbacks monitor it, else by its name."""
    return monitored_modes(trainer).get(metric, mode_of_name(metric))
