"""Measures the success rate of a backdoor."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch

from lightning_fl.attacks.data import Trigger


class BackdoorSuccess(L.Callback):
    """Logs ``backdoor_success``: the share of evaluation examples that the global model classifies as ``target``.

    Examples whose true class is ``target`` are left out. The module's ``forward`` has to return class scores.

    Args:
        trigger: The trigger that is applied to each example. None: none, for a semantic backdoor. Default:
            :class:`Trigger` with its defaults.
        target: The attackers' class. Default 0.
        source: Only examples of this class are counted, for a semantic backdoor. Default None: all.
    """

    def __init__(self, trigger: Trigger | None = Trigger(), target: int = 0, source: int | None = None) -> None:  # noqa: B008
        self.trigger = trigger
        self.target = target
        self.source = source

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Counts the examples of a batch."""
        self._log(pl_module, batch)

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Counts the examples of a batch."""
        self._log(pl_module, batch)

    def _log(self, module: L.LightningModule, batch: Any) -> None:
        x, y = batch
        chosen = y != self.target if self.source is None else y == self.source
        if not chosen.any():
            return
        x = x[chosen] if self.trigger is None else self.trigger(x[chosen])
        with torch.no_grad():
            hits = (module(x).argmax(1) == self.target).float()
        module.log("backdoor_success", hits.mean(), on_epoch=True, batch_size=len(hits))
