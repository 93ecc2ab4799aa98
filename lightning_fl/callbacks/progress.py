"""Progress of a federation: rounds, the cohort at hand, the global metric, the time left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

from lightning_fl.callbacks.federated import FederatedCallback
from lightning_fl.strategies import FederatedStrategy
from lightning_fl.types import Aggregate, ClientId, LocalRun, Update

MAX_LINES = 20
SECONDS_OF_SPEED = 3600.0
"""The time left is that at the speed of the last hour: a round may take many minutes."""


class _TimeLeft(TimeRemainingColumn):
    """The time left for the rounds; a cohort is soon done."""

    def render(self, task: Task) -> Text:
        return Text.assemble(super().render(task), " left") if task.fields["is_rounds"] else Text()


class FederatedProgressBar(ProgressBar, FederatedCallback):
    """Shows the rounds with the time left and the global metrics, and below them how far the cohort is.

    ``lightning-fl fit`` takes it unless the configuration names another. What the module logs with ``prog_bar=True``
    is shown. With several ranks it is rank 0's clients whose progress shows. Where the output is no terminal, such as
    in a file, a line is printed for about every twentieth round.

    Args:
        metrics: Names of the metrics to show. None: those logged with ``prog_bar=True``.
        console: Where to print. None: the terminal.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(strategy="fedavg", callbacks=[FederatedProgressBar()], logger=False, accelerator="cpu")
    """

    def __init__(self, metrics: Sequence[str] | None = None, console: Console | None = None) -> None:
        super().__init__()
        self.metrics = None if metrics is None else tuple(metrics)
        self.console = console or Console()
        self._progress: Progress | None = None
        self._enabled = True
        self._rounds_task: TaskID | None = None
        self._cohort_task: TaskID | None = None
        self._num_rounds: int | None = None
        self._phase = ""

    def enable(self) -> None:
        """Turns the bar on."""
        self._enabled = True

    def disable(self) -> None:
        """Turns the bar off, as Lightning does on all ranks but the first."""
        self._enabled = False

    # ---- training

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Shows the empty bar."""
        if not self._enabled:
            return
        max_epochs = trainer.max_epochs
        self._num_rounds = max_epochs if max_epochs is not None and max_epochs > 0 else None
        self._begin()
        if self._progress is not None:
            self._rounds_task = self._progress.add_task(
                "rounds", total=self._num_rounds, completed=trainer.current_epoch
            )
            self._cohort_task = self._progress.add_task("clients", total=None)

    def on_round_start(
        self, trainer: L.Trainer, module: L.LightningModule, round: int, cohort: Sequence[ClientId]
    ) -> None:
        """Begins the cohort's bar."""
        strategy = trainer.strategy
        if self._progress is not None and self._cohort_task is not None and isinstance(strategy, FederatedStrategy):
            own = len(strategy.active_rounds.plan.clients)
            where = "" if own == len(cohort) else f" (of {len(cohort)}, here)"
            self._progress.reset(self._cohort_task, total=own, description=f"clients{where}")

    def on_client_end(
        self, trainer: L.Trainer, module: L.LightningModule, client: ClientId, run: LocalRun, update: Update | None
    ) -> None:
        """Moves the cohort's bar on by one client."""
        if self._progress is not None and self._cohort_task is not None:
            self._progress.advance(self._cohort_task)

    def on_aggregate_end(self, trainer: L.Trainer, module: L.LightningModule, aggregate: Aggregate) -> None:
        """Tells that the cohort is done."""
        if self._progress is not None and self._cohort_task is not None:
            self._progress.update(self._cohort_task, description="clients")

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Moves the bar of the rounds on by one, with the global model's metrics."""
        if not self._enabled:
            return
        done = trainer.current_epoch + 1
        shown = self._shown(trainer, pl_module)
        if self._progress is not None and self._rounds_task is not None:
            self._progress.update(self._rounds_task, completed=done, metrics=shown)
        elif not self.console.is_terminal and self._is_due(done):
            of = "" if self._num_rounds is None else f"/{self._num_rounds}"
            self.console.print(f"round {done}{of}  {shown}", highlight=False, soft_wrap=True)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leaves the last state on the screen."""
        if self._progress is not None and self._cohort_task is not None:
            self._progress.update(self._cohort_task, visible=False)
        self._end()

    # ---- evaluation outside of training

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Tells that the global model is being validated."""
        if self._progress is not None and self._cohort_task is not None and trainer.training:
            self._progress.update(self._cohort_task, description="clients, validating")

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Gives the terminal back."""
        self._end()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Gives the terminal back."""
        self._end()

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Prints above the bar."""
        self.console.print(*args, highlight=False)

    # ---- the bar itself

    def _begin(self) -> None:
        self._end()
        if self.console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                _TimeLeft(),
                TextColumn("{task.fields[metrics]}"),
                console=self.console,
                speed_estimate_period=SECONDS_OF_SPEED,
            )
            self._progress.start()

    def _end(self) -> None:
        progress, self._progress = self._progress, None
        self._rounds_task = self._cohort_task = None
        if progress is not None:
            progress.stop()

    def _is_due(self, done: int) -> bool:
        every = max(1, (self._num_rounds or 1) // MAX_LINES)
        return done % every == 0 or done == self._num_rounds

    def _shown(self, trainer: L.Trainer, pl_module: L.LightningModule) -> str:
        if self.metrics is None:
            found: dict[str, Any] = dict(trainer.progress_bar_metrics)
        else:
            found = {name: trainer.callback_metrics[name] for name in self.metrics if name in trainer.callback_metrics}
        return "  ".join(f"{name} {float(value):.4g}" for name, value in found.items())
