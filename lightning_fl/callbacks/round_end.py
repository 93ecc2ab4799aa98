"""The base class of callbacks that record or show a round once all of it has been logged."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping
from torch import Tensor

from lightning_fl.strategies.internals import is_ending_resumed_round


class RoundEndCallback(L.Callback):
    """A callback that looks at a round, or an epoch, when the module's own ``on_train_epoch_end`` has logged.

    Lightning calls the callbacks before the module in that hook, except those that monitor a metric. The others under
    this class have their turn among these: after early stopping, which may log, and before the checkpoints, which hold
    the callbacks' states.
    """

    _before: dict[str, Tensor]
    """The metrics as the last round has left them."""

    def on_round_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Called under every strategy when a round is over: validated, and all of it logged."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Notes what earlier rounds have logged."""
        # What a checkpoint inside a round holds has been logged in that round.
        self._before = {} if is_ending_resumed_round(trainer) else dict(trainer.callback_metrics)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Takes a turn after the module's hook."""
        callbacks = [own for own in trainer.callbacks if not (isinstance(own, _Turn) and own.callback is self)]  # type: ignore[attr-defined]
        place = next((at for at, own in enumerate(callbacks) if isinstance(own, Checkpoint)), len(callbacks))
        # A new list: Lightning goes through the old one at the moment.
        trainer.callbacks = [*callbacks[:place], _Turn(self), *callbacks[place:]]  # type: ignore[attr-defined]

    def logged_in_round(self, trainer: L.Trainer) -> dict[str, float]:
        """What was logged since this was called last; ``callback_metrics`` keeps values of earlier rounds too."""
        before, self._before = self._before, dict(trainer.callback_metrics)
        # By their memory: Lightning shows the same value as a new tensor each time that it is read.
        return {
            name: float(value)
            for name, value in self._before.items()
            if name not in before or value.data_ptr() != before[name].data_ptr()
        }


class _Turn(EarlyStopping):
    """Calls a callback's ``on_round_end`` once. Lightning calls only checkpoints and this class after the module."""

    def __init__(self, callback: RoundEndCallback) -> None:
        super().__init__(monitor="")
        self.callback = callback

    @property
    def state_key(self) -> str:
        return f"{self.callback.state_key}.on_round_end"

    def state_dict(self) -> dict[str, Any]:
        return {}

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._leave(trainer)
        self.callback.on_round_end(trainer, pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._leave(trainer)

    def _leave(self, trainer: L.Trainer) -> None:
        trainer.callbacks = [own for own in trainer.callbacks if own is not self]  # type: ignore[attr-defined]
