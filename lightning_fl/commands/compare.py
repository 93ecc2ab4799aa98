"""Compares runs: a table, and the curves of a metric over the rounds.

A run is the folder that `lightning-fl fit` has written, such as logs/digits_fedavg/version_0; of a folder that holds
several runs the last is taken. A centralised run (--trainer.strategy auto) is compared epoch by round.

Examples:
  lightning-fl compare logs/fedavg logs/fedprox logs/central
  lightning-fl compare logs/*/version_0 --metric val_loss --target 0.3 --out losses.png
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lightning_fl.tracking import Run, plots
from lightning_fl.tracking.metrics import best_metric, is_higher_better

MAX_NAME = 48


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's own options."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the folders of the runs")
    parser.add_argument("--metric", help="what to compare (default: validation accuracy if there is one, else loss)")
    parser.add_argument("--target", type=float, help="also tell in which round the metric first reached this")
    parser.add_argument("--out", type=Path, default=Path("compare.png"), help="the picture (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    """Prints the table and writes the picture."""
    runs = [Run.read(path) for path in args.runs]
    metric = args.metric or best_metric(runs)
    for one in runs:
        if metric not in one.metric_names:
            known = ", ".join(one.metric_names) or "none: no round has been finished"
            raise ValueError(f"{one.path} has no metric {metric!r}. Its metrics: {known}.")
    names = short_names(runs)
    print_table(runs, names, metric, args.target, Console())
    print_differences(runs, names, Console())
    if not plots.is_available():
        print('There is no picture without matplotlib: pip install "lightning-fl[tracking]"')
        return
    curves = {name: one.metric(metric) for name, one in zip(names, runs, strict=True)}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_bytes(plots.as_png(plots.curves_figure(curves, metric, 7.5, 4.2)))
    print(f"picture: {args.out}")


def short_names(runs: Sequence[Run]) -> list[str]:
    """The runs' folders without the part that all share, and without a version that all have."""
    paths = [one.path.resolve() for one in runs]
    shared = Path(os.path.commonpath(paths)) if len(set(paths)) > 1 else paths[0].parent.parent
    names = [str(path.relative_to(shared)) for path in paths]
    parents = [name.rpartition("/")[0] for name in names]
    if all(parents) and len(set(parents)) == len(parents):
        names = parents
    return [name if len(name) <= MAX_NAME else "..." + name[3 - MAX_NAME :] for name in names]


def print_table(runs: Sequence[Run], names: Sequence[str], metric: str, target: float | None, console: Console) -> None:
    """Prints a row for each run."""
    better = max if is_higher_better(metric) else min
    direction = "highest" if better is max else "lowest"
    columns = ["run", "algorithm", "rounds", f"last {metric}", f"{direction} (round)"]
    if target is not None:
        columns.append(f"reached {target:g} in")
    table = Table(*columns, "local steps", "sent by rank 0", "time")
    for one, name in zip(runs, names, strict=True):
        rounds, values = one.metric(metric)
        finite = [(value, number) for number, value in zip(rounds, values, strict=True) if math.isfinite(value)]
        best, best_round = better(finite, key=lambda pair: pair[0]) if finite else (math.nan, 0)
        cells = [name, one.algorithm, str(len(one.rounds)), f"{values[-1]:.4g}", f"{best:.4g} ({best_round})"]
        if target is not None:
            reached = [number for value, number in finite if (value >= target if better is max else value <= target)]
            cells.append(f"round {reached[0]}" if reached else "never")
        steps, sent = one.total("num_steps"), one.total("num_bytes")
        cells.append("?" if steps is None else f"{steps:,.0f}")
        cells.append("-" if sent is None else f"{sent / 1e6:,.1f} MB")
        cells.append("?" if one.seconds is None else f"{one.seconds:,.1f} s")
        table.add_row(*cells)
    console.print(table)


def print_differences(runs: Sequence[Run], names: Sequence[str], console: Console) -> None:
    """Prints the settings in which the runs differ."""
    keys = dict.fromkeys(key for one in runs for key in one.settings)
    differing = [key for key in keys if len({one.settings.get(key) for one in runs}) > 1]
    if not differing:
        return
    table = Table("setting", *names, title="In which they differ", title_justify="left")
    for key in differing:
        table.add_row(key, *(one.settings.get(key, "-") for one in runs))
    console.print(table)
