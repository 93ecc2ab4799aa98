"""A progress bar of rounds and clients, with the global metrics and the time left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from lightning_fl.callbacks.federated import FederatedCallback
from lightning_fl.callbacks.round_end import RoundEndCallback
from lightning_fl.strategies.round_view import RoundView
from lightning_fl.types import Aggregate, ClientId

MAX_LINES = 20
SECONDS_OF_SPEED = 3600.0
"""Seconds of progress from which the time left is estimated; an hour, since a round may take many minutes."""


class FederatedProgressBar(RoundEndCallback, ProgressBar, FederatedCallback):
    """Shows the rounds with the time left and the global metrics, and below them the progress within the cohort.

    ``lightning-fl fit`` uses it unless the configuration names another. Values that the module logs with
    ``prog_bar=True`` are shown. With several ranks, the progress is that of rank 0's clients. If the output is not a
    terminal but, for example, a file, a line is printed about 20 times in a run.

    Args:
        metrics: Names of the metrics to show. None: those logged with ``prog_bar=True``.
        console: The console to print to. None: the terminal.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(strategy="fedavg", callbacks=[FederatedProgressBar()], logger=False, accelerator="cpu")
    """

    def __init__(self, metrics: Sequence[str] | None = None, console: Console | None = None) -> None:
        super().__init__()
        self.metrics = None if metrics is None else tuple(metrics)
        self.console = console or Console()
        self._enabled = True
        self._bars: _Bars | None = None
        self._num_rounds: int | None = None

    @property
    def is_enabled(self) -> bool:
        """Whether the bar is on, which decides where ``LightningModule.print`` prints."""
        return self._enabled

    @property
    def is_disabled(self) -> bool:
        """Whether the bar is off."""
        return not self._enabled

    def enable(self) -> None:
        """Turns the bar on."""
        self._enabled = True

    def disable(self) -> None:
        """Turns the bar off, as Lightning does on all ranks but the first."""
        self._enabled = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Shows the empty bars."""
        super().on_train_start(trainer, pl_module)
        max_epochs = trainer.max_epochs
        # Lightning's -1 means training without an end.
        self._num_rounds = max_epochs if max_epochs is not None and max_epochs > 0 else None
        if self._enabled and self.console.is_terminal:
            self._bars = _Bars(self.console, self._num_rounds, trainer.current_epoch)

    def on_round_start(
        self, trainer: L.Trainer, module: L.LightningModule, round: int, cohort: Sequence[ClientId], view: RoundView
    ) -> None:
        """Starts the cohort's bar."""
        if self._bars is not None:
            self._bars.begin_cohort(len(view.clients), len(cohort))

    def on_group_end(
        self, trainer: L.Trainer, module: L.LightningModule, clients: Sequence[ClientId], view: RoundView
    ) -> None:
        """Advances the cohort's bar by the clients that have finished."""
        if self._bars is not None:
            # Advanced by groups: a callback that overrides a hook for single clients makes them train one after the
            # other.
            self._bars.end_clients(len(clients))

    def on_aggregate_end(
        self, trainer: L.Trainer, module: L.LightningModule, aggregate: Aggregate, view: RoundView
    ) -> None:
        """Completes the cohort's bar; validation of the global model follows."""
        if self._bars is not None:
            self._bars.end_cohort("validation")

    def on_round_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Advances the rounds' bar by one, with the global model's metrics."""
        done = trainer.current_epoch + 1
        if self._bars is not None:
            self._bars.end_round(done, self._shown(trainer))
        elif self._enabled and self._is_due(done):
            of = "" if self._num_rounds is None else f"/{self._num_rounds}"
            # Without soft_wrap, rich would wrap the line at the width that it assumes for a file.
            self.console.print(
                f"round {done}{of}  {self._shown(trainer)}", markup=False, highlight=False, soft_wrap=True
            )

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leaves the rounds' bar on the screen."""
        self._close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Removes the cohort's bar and stops drawing."""
        self._close()

    def print(self, *args: Any, sep: str = " ", end: str = "\n", **kwargs: Any) -> None:
        """Prints above the bars."""
        self.console.print(*args, sep=sep, end=end, markup=False, highlight=False)

    def _close(self) -> None:
        bars, self._bars = self._bars, None
        if bars is not None:
            bars.close()

    def _is_due(self, done: int) -> bool:
        every = max(1, (self._num_rounds or 1) // MAX_LINES)
        return done % every == 0 or done == self._num_rounds

    def _shown(self, trainer: L.Trainer) -> str:
        if self.metrics is None:
            found: dict[str, Any] = dict(trainer.progress_bar_metrics)
        else:
            found = {name: trainer.callback_metrics[name] for name in self.metrics if name in trainer.callback_metrics}
        return "  ".join(f"{name} {float(value):.4g}" for name, value in found.items())


class _TimeLeft(TimeRemainingColumn):
    """The time left, on the rounds' bar only."""

    def render(self, task: Task) -> Text:
        # The cohort's bar restarts in every round, so an estimate from the last hour would be wrong.
        return Text.assemble(super().render(task), " left") if task.description == "rounds" else Text()


class _Bars:
    """A bar for the rounds and one for the current cohort."""

    def __init__(self, console: Console, num_rounds: int | None, done: int) -> None:
        text = TextColumn("{task.fields[text]}", markup=False)
        columns = (TextColumn("{task.description}"), BarColumn(24), MofNCompleteColumn(), _TimeLeft(), text)
        self._progress = Progress(*columns, console=console, speed_estimate_period=SECONDS_OF_SPEED)
        self._rounds = self._progress.add_task("rounds", total=num_rounds, completed=done, text="")
        self._cohort = self._progress.add_task("clients", total=None, text="")
        self._progress.start()

    def begin_cohort(self, num_here: int, num_clients: int) -> None:
        text = "" if num_here == num_clients else f"on this rank, of {num_clients} in the round"
        self._progress.update(self._cohort, completed=0, total=num_here, text=text)

    def end_clients(self, num_clients: int) -> None:
        self._progress.advance(self._cohort, num_clients)

    def end_cohort(self, text: str) -> None:
        # Clients whose loader failed have not advanced the bar.
        total = self._progress.tasks[self._cohort].total
        self._progress.update(self._cohort, completed=total, text=text, refresh=True)

    def end_round(self, done: int, metrics: str) -> None:
        self._progress.update(self._rounds, completed=done, text=metrics)

    def close(self) -> None:
        self._progress.update(self._cohort, visible=False)
        self._progress.stop()
