"""Sets up a run, and summarises its partition instead of training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lightning_fl.cli.lightning_cli import FederatedCLI
from lightning_fl.strategies import FederatedStrategy
from lightning_fl.strategies.validation import forbid_client_disclosure
from lightning_fl.tracking import PartitionSummary, summarise

MAX_ROWS = 30
MAX_COLUMNS = 12


class PartitionCLI(FederatedCLI):
    """Sets up a run, and summarises its partition instead of training.

    Args:
        args: The arguments of the command line.
        look: The run's only callback.
    """

    def __init__(self, args: Sequence[str], look: LookAtPartition) -> None:
        self.look = look  # LightningCLI runs `fit`, and so `before_fit`, in its constructor
        super().__init__(args)

    def before_fit(self) -> None:
        """Removes everything that would write files or validate."""
        if not isinstance(self.trainer.strategy, FederatedStrategy):
            raise MisconfigurationException(
                f"A partition needs clients, but the strategy is {type(self.trainer.strategy).__name__}. "
                "Add --trainer.strategy fedavg."
            )
        self.trainer.num_sanity_val_steps = 0
        self.trainer.loggers = []
        self.trainer.callbacks = [self.look]  # type: ignore[attr-defined]


class LookAtPartition(L.Callback):
    """Summarises the partition and stops the Trainer before the first batch.

    Args:
        max_clients: Maximum number of clients to read.
    """

    def __init__(self, max_clients: int) -> None:
        self.max_clients = max_clients
        self.summary: PartitionSummary | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Summarises the partition; a collective call, because each silo reads its own data."""
        trainer.should_stop = True
        assert isinstance(trainer.strategy, FederatedStrategy)
        strategy = trainer.strategy
        settings = strategy.view.settings
        if settings.silos:
            forbid_client_disclosure("lightning-fl partition", settings)
        found = summarise(
            strategy.view.population,
            strategy.federation,
            self.max_clients,
            read_samples=True,
            share_labels=not (settings.silos and settings.is_differentially_private),
        )
        self.summary = found if trainer.is_global_zero else None


def show(summary: PartitionSummary, console: Console) -> None:
    """Prints the partition: a row per client, then sizes and heterogeneity."""
    shows_labels = 0 < len(summary.labels) <= MAX_COLUMNS
    columns = list(summary.labels) if shows_labels else []
    console.print("Partition: examples of each label" if shows_labels else "Partition")
    table = Table()
    table.add_column("client")
    for column in ("examples", *columns):
        table.add_column(escape(str(column)), justify="right")
    for row in _rows_shown(len(summary.ids)):
        if row is None:
            table.add_row(*["..."] * (2 + len(columns)))
            continue
        counts = [str(count) if count else "·" for count in summary.counts[row]] if shows_labels else []
        table.add_row(escape(str(summary.ids[row])), _size(summary.sizes[row]), *counts)
    console.print(table)
    for line in facts(summary):
        console.print(line, highlight=False, soft_wrap=True)


def facts(summary: PartitionSummary) -> list[str]:
    """Sizes and heterogeneity in words, one line each."""
    sizes = summary.known_sizes
    shown = "" if len(summary.ids) == summary.num_clients else f", {len(summary.ids):,} of them read"
    lines = [f"clients: {summary.num_clients:,}{shown}"]
    if sizes:
        median = sorted(sizes)[len(sizes) // 2]
        lines.append(f"examples: {sum(sizes):,}; a client has {min(sizes):,} to {max(sizes):,}, the median {median:,}")
    empty = [str(client) for client, size in zip(summary.ids, summary.sizes, strict=True) if size == 0]
    if empty:
        lines.append(f"without examples: {', '.join(empty[:10])}{', ...' if len(empty) > 10 else ''}")
    if summary.label_skew is not None and summary.label_skew_if_iid is not None:
        lines.append(
            f"label skew: {summary.label_skew:.2f} (0: all have the same mix of labels, 1: none in common; "
            f"with labels drawn at random it would be {summary.label_skew_if_iid:.2f})"
        )
    else:
        lines.append("label skew: unknown, since the data has no labels that can be counted")
    return lines


def _rows_shown(count: int) -> list[int | None]:
    if count <= MAX_ROWS:
        return list(range(count))
    half = MAX_ROWS // 2
    return [*range(half), None, *range(count - half, count)]


def _size(size: Any) -> str:
    return "?" if size is None else f"{size:,}"
