"""Compares runs: a table, and the curves of a metric over the rounds.

A run is the folder that `lightning-fl fit` has written, such as logs/digits_fedavg/version_0; in a folder of several
runs, the last one counts. An epoch of a centralised run (--trainer.strategy auto) is compared with a round.

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

from rich import box
from rich.console import Console
from rich.table import Table

from lightning_fl.cli.command import check_output
from lightning_fl.tracking import Run, plots
from lightning_fl.tracking.metrics import best_metric, is_higher_better

MAX_NAME = 48


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's own options."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the folders of the runs")
    parser.add_argument("--metric", help="what to compare (default: validation accuracy if there is one, else loss)")
    parser.add_argument("--target", type=float, help="also show the round in which the metric first reached this")
    parser.add_argument("--out", type=Path, default=Path("compare.png"), help="the picture (default: %(default)s)")


def run(args: argparse.Namespace) -> None:
    """Prints the table and writes the picture."""
    check_output(args.out)
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
    args.out.write_bytes(plots.as_png(plots.curves_figure(curves, metric, 7.5, 4.2)))
    print(f"picture: {args.out}")


def short_names(runs: Sequence[Run]) -> list[str]:
    """The runs' folders without the part that they share, and without the version if the rest is unique."""
    paths = [one.path.resolve() for one in runs]
    shared = Path(os.path.commonpath(paths)) if len(set(paths)) > 1 else paths[0].parent.parent
    names = [str(path.relative_to(shared)) for path in paths]
    parents = [name.rpartition("/")[0] for name in names]
    if all(parents) and len(set(parents)) == len(parents):
        names = parents
    return [name if len(name) <= MAX_NAME else "..." + name[3 - MAX_NAME :] for name in names]


def print_table(runs: Sequence[Run], names: Sequence[str], metric: str, target: float | None, console: Console) -> None:
    """Prints a row per run."""
    is_higher = is_higher_better(metric)
    columns: dict[str, list[str]] = {"run": list(names), "algorithm": [_algorithm(one) for one in runs]}
    columns["rounds"] = [str(len(one.rounds)) for one in runs]
    columns[f"last {metric}"] = [f"{one.metric(metric)[1][-1]:.4g}" for one in runs]
    best = [_best(one, metric, is_higher) for one in runs]
    columns["highest" if is_higher else "lowest"] = [value for value, _ in best]
    columns["in round"] = [number for _, number in best]
    if target is not None:
        columns[f"{target:g} in round"] = [_reached(one, metric, target, is_higher) for one in runs]
    columns["steps"] = [f"{one.total('num_steps') or 0:,.0f}" for one in runs]
    sent = [one.total("num_bytes") or 0 for one in runs]
    if any(sent):
        columns["MB sent"] = [f"{num_bytes / 1e6:,.1f}" for num_bytes in sent]
    columns["seconds"] = [f"{one.seconds or 0:,.1f}" for one in runs]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for name in columns:
        is_word = name in ("run", "algorithm")
        table.add_column(name, justify="left" if is_word else "right", no_wrap=is_word)
    for cells in zip(*columns.values(), strict=True):
        table.add_row(*cells)
    console.print(table)


def _algorithm(run: Run) -> str:
    return run.settings.get("algorithm", "centralised").partition("(")[0]


def _finite(run: Run, metric: str) -> list[tuple[float, int]]:
    rounds, values = run.metric(metric)
    return [(value, number) for number, value in zip(rounds, values, strict=True) if math.isfinite(value)]


def _best(run: Run, metric: str, is_higher: bool) -> tuple[str, str]:
    sign = 1 if is_higher else -1
    best = max(_finite(run, metric), key=lambda pair: sign * pair[0], default=None)
    return ("-", "-") if best is None else (f"{best[0]:.4g}", str(best[1]))


def _reached(run: Run, metric: str, target: float, is_higher: bool) -> str:
    reached = [number for value, number in _finite(run, metric) if (value >= target if is_higher else value <= target)]
    return str(reached[0]) if reached else "never"


def print_differences(runs: Sequence[Run], names: Sequence[str], console: Console) -> None:
    """Prints the settings that differ between runs that have them; a centralised run lacks those of a federation."""
    keys = dict.fromkeys(key for one in runs for key in one.settings)
    found = {key: {one.settings[key] for one in runs if key in one.settings} for key in keys}
    differing = [key for key, values in found.items() if len(values) > 1]
    if not differing:
        return
    console.print("Settings in which they differ:")
    table = Table("setting", *names, box=box.SIMPLE_HEAD, pad_edge=False)
    for key in differing:
        table.add_row(key, *(one.settings.get(key, "-") for one in runs))
    console.print(table)
