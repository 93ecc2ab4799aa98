"""Small runs under sample-level privacy."""

from __future__ import annotations

from typing import Any

import lightning as L
from torch import Tensor

from lightning_fl import FederatedStrategy
from lightning_fl.callbacks import SampleLevelDP
from tests.helpers.training import Plain, image_clients, trainer, weights

SIZES = (3, 20, 50)


def private(**options: Any) -> SampleLevelDP:
    given = {"noise_multiplier": 1.0, **options}
    if "target_epsilon" in options:
        del given["noise_multiplier"]
    return SampleLevelDP(**given)


def fit(
    callback: SampleLevelDP, rounds: int = 1, module: L.LightningModule | None = None, data: Any = None, **options: Any
) -> tuple[L.Trainer, Tensor]:
    """Trains a small network; gives the Trainer, and the weights."""
    of_strategy = ("algorithm", "local_epochs", "local_steps", "clients_per_round", "engine", "personal", "seed")
    strategy = FederatedStrategy(**{name: options.pop(name) for name in of_strategy if name in options})
    of_fit = {name: options.pop(name) for name in ("ckpt_path", "weights_only") if name in options}
    module = Plain() if module is None else module
    run = trainer(strategy, rounds, **{**options, "callbacks": [callback, *options.get("callbacks", ())]})
    run.fit(module, image_clients(SIZES, 8) if data is None else data, **of_fit)
    return run, weights(module)
