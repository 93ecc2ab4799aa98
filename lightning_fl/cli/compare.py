"""Compares runs: a table, and the curves of a metric over the rounds.

A run is the folder that `lightning-fl fit` has written, such as logs/digits_fedavg/version_0; in a folder of several
runs, the last one counts. An epoch of a centralised run (--trainer.strategy auto) is compared with a round.

With --group-by, runs that share a setting are one row, with mean and standard deviation over them: group the seeds of
an experiment by what it varies. The names of settings are those of the second table.

Examples:
  lightning-fl compare logs/fedavg logs/fedprox logs/central
  lightning-fl compare logs/*/version_0 --metric val_loss --target 0.3 --out losses.png
  lightning-fl compare logs/fedavg_* logs/fedprox_* --group-by algorithm --baseline "FedAvg(server_lr=1.0)"
  lightning-fl compare logs/* --group-by algorithm --format latex
  lightning-fl compare logs/fedavg logs/fedprox --out compare.html
"""

from __future__ import annotations

import argparse
import csv
import io
import math
import os
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from lightning_fl.cli.command import check_output
from lightning_fl.tracking import Run, plots
from lightning_fl.tracking.index import write_index
from lightning_fl.tracking.metrics import Mode, best_metric, mode_of
from lightning_fl.tracking.tables import markdown_table

MAX_NAME = 48
MODE_HELP = "whether less or more of the metric is better (default: as ModelCheckpoint monitors it, or by its name)"
FORMATS = ("table", "csv", "md", "latex")
Columns = Mapping[str, Sequence[str]]
_NUMBER = re.compile(r"\d{1,3}(,\d{3})+(\.\d+)?( |$)")
_LATEX = {
    **{mark: f"\\{mark}" for mark in "&%_#${}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
    **{"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", "±": r"$\pm$"},
}


@dataclass(frozen=True)
class Group:
    """Runs that are one row of the table.

    Args:
        name: The name of the row.
        runs: At least one run.
    """

    name: str
    runs: Sequence[Run]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the command's own options."""
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the folders of the runs")
    parser.add_argument("--metric", help="the metric (default: validation accuracy if there is one, else loss)")
    parser.add_argument("--mode", choices=("min", "max"), help=MODE_HELP)
    parser.add_argument("--target", type=float, help="also show the round in which the metric first reached this")
    parser.add_argument("--group-by", metavar="SETTING", help="one row for the runs that share this setting")
    parser.add_argument("--baseline", metavar="NAME", help="a row's name: the others show their difference from it")
    parser.add_argument("--format", choices=FORMATS, default="table", help="how to print (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("compare.png"), help="picture, or *.html (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> None:
    """Prints the tables and writes the picture."""
    check_output(args.out)
    runs = read_runs(args.runs)
    metric = args.metric or best_metric(runs)
    for one in runs:
        if metric not in one.metric_names:
            known = ", ".join(one.metric_names) or "none: no round has been finished"
            raise ValueError(f"{one.path} has no metric {metric!r}. Its metrics: {known}.")
    groups = make_groups(runs, args.group_by)
    columns, differing = compare(groups, metric, args.target, args.baseline, args.mode), differences(groups)
    if args.format == "csv":  # one table, for programs
        rows = zip(differing["setting"], zip(*(differing[group.name] for group in groups), strict=True), strict=True)
        columns = {**columns, **{f"setting {key}": cells for key, cells in rows}}
    show(columns, args.format)
    if differing["setting"] and args.format != "csv":
        print("\nSettings in which they differ:\n" if args.format in ("table", "md") else "")
        show(differing, args.format)
    # What is printed for a program or a paper is the tables alone.
    out = sys.stdout if args.format == "table" else sys.stderr
    if args.out.suffix == ".html":
        write_index(runs, args.out)
        print(f"page: {args.out}", file=out)
        return
    if not plots.is_available():
        print('There is no picture without matplotlib: pip install "lightning-fl[tracking]"', file=out)
        return
    args.out.write_bytes(curves_of(groups, metric))
    print(f"picture: {args.out}", file=out)


def read_runs(paths: Sequence[str]) -> list[Run]:
    """The runs of some folders. What a pattern such as ``logs/*`` finds beside them is left out, and said.

    Raises:
        ValueError: If a folder does not exist, or none of them holds a run that has finished a round.
    """
    runs, left_out = [], []
    for path in paths:
        try:
            run = Run.read(path)
            if not run.rounds:
                raise ValueError(f"{path} has finished no round; its status: {run.facts.get('status', '?')}.")
            runs.append(run)
        except ValueError as error:
            if not Path(path).exists():
                raise
            left_out.append(str(error))
    if not runs:
        raise ValueError(left_out[0])
    for reason in left_out:
        print(f"left out: {reason}", file=sys.stderr)
    return runs


def make_groups(runs: Sequence[Run], setting: str | None) -> list[Group]:
    """A group for each run, or for each value of a setting.

    Raises:
        ValueError: If no run has the setting.
    """
    if setting is None:
        return [Group(name, [one]) for name, one in zip(short_names(runs), runs, strict=True)]
    if not any(setting in one.settings for one in runs):
        known = ", ".join(dict.fromkeys(key for one in runs for key in one.settings))
        raise ValueError(f"No run has a setting {setting!r} to group by. The settings are {known}.")
    values = dict.fromkeys(one.settings.get(setting, "centralised") for one in runs)
    return [
        Group(value, [one for one in runs if one.settings.get(setting, "centralised") == value]) for value in values
    ]


def short_names(runs: Sequence[Run]) -> list[str]:
    """The runs' folders without the part that they share, and without the version if the rest is unique."""
    paths = [one.path.resolve() for one in runs]
    shared = Path(os.path.commonpath(paths)) if len(set(paths)) > 1 else paths[0].parent.parent
    names = [str(path.relative_to(shared)) for path in paths]
    parents = [name.rpartition("/")[0] for name in names]
    if all(parents) and len(set(parents)) == len(parents):
        names = parents
    return [name if len(name) <= MAX_NAME else "..." + name[3 - MAX_NAME :] for name in names]


def compare(
    groups: Sequence[Group], metric: str, target: float | None, baseline: str | None, mode: Mode | None = None
) -> Columns:
    """The table: a row for each group, numbers with their deviation where a group has several runs.

    Raises:
        ValueError: If there is no group of the baseline's name, or a target of a metric whose mode is unknown.
    """
    everything = [group.runs for group in groups]
    mode = mode or mode_of(metric, [one for runs in everything for one in runs])
    if target is not None and mode is None:
        raise ValueError(f"Whether more of {metric!r} is better or less is not known; give --mode max or --mode min.")
    columns: dict[str, Sequence[str]] = {"run": [group.name for group in groups]}
    columns["algorithm"] = [", ".join(dict.fromkeys(map(_algorithm, runs))) for runs in everything]
    if any(len(runs) > 1 for runs in everything):
        columns["runs"] = [str(len(runs)) for runs in everything]
    ended = [", ".join(dict.fromkeys(_status(one) for one in runs)) for runs in everything]
    if any(status != "finished" for status in ended):
        columns["status"] = ended
    columns["rounds"] = [_spread([len(one.rounds) for one in runs], ",.4g") for runs in everything]
    last = [[one.metric(metric)[1][-1] for one in runs] for runs in everything]
    columns[f"last {metric}"] = [_spread(values, ".4g") for values in last]
    if baseline is not None:
        names = columns["run"]
        if baseline not in names:
            raise ValueError(f"There is no row {baseline!r} for --baseline; the rows are {', '.join(names)}.")
        reference = statistics.fmean(last[names.index(baseline)])
        columns["difference"] = [f"{statistics.fmean(values) - reference:+.4g}" for values in last]
    # Where it is not known which of the two is the best, both are shown.
    for shown in [mode] if mode else ["max", "min"]:
        best = [[_best(one, metric, shown == "max") for one in runs] for runs in everything]
        end = "highest" if shown == "max" else "lowest"
        columns[end] = [_spread([value for value, _ in pairs], ".4g") for pairs in best]
        columns["in round" if mode else f"{end} in round"] = [
            _spread([number for _, number in pairs], ",.4g") for pairs in best
        ]
    if target is not None:
        reached = [[_reached(one, metric, target, mode == "max") for one in runs] for runs in everything]
        columns[f"{target:g} in round"] = [_spread(rounds, ",.4g", absent="never") for rounds in reached]
    columns["steps"] = [_spread([one.total("num_steps") or 0 for one in runs], ",.0f") for runs in everything]
    sent = [[(one.total("num_bytes") or 0) / 1e6 for one in runs] for runs in everything]
    if any(map(any, sent)):
        columns["MB sent"] = [_spread(values, ",.1f") for values in sent]
    columns["seconds"] = [_spread([one.seconds or 0 for one in runs], ",.1f") for runs in everything]
    return columns


def differences(groups: Sequence[Group]) -> Columns:
    """The settings that differ between runs that have them; a centralised run lacks those of a federation."""
    keys = dict.fromkeys(key for group in groups for one in group.runs for key in one.settings)

    def values(group: Group, key: str) -> list[str]:
        return list(dict.fromkeys(one.settings[key] for one in group.runs if key in one.settings))

    differing = [
        key for key in keys if len({tuple(sorted(own)) for group in groups if (own := values(group, key))}) > 1
    ]
    cells = {group.name: [", ".join(values(group, key)) or "-" for key in differing] for group in groups}
    return {"setting": differing, **cells}


def show(columns: Columns, kind: str) -> None:
    """Prints a table for people, as Markdown, as CSV or as LaTeX."""
    if kind != "table":
        print(as_text(columns, kind), end="")
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for name in columns:
        is_word = name in ("run", "algorithm", "status", "setting") or "setting" in columns
        # Words may wrap in a narrow terminal; a number must not be cut off.
        table.add_column(escape(name), justify="left" if is_word else "right", no_wrap=not is_word, overflow="fold")
    for row in zip(*columns.values(), strict=True):
        table.add_row(*map(escape, row))
    Console(width=max(Console().width, 100)).print(table)


def as_text(columns: Columns, kind: str) -> str:
    """A table as CSV, Markdown or LaTeX."""
    rows = list(zip(*columns.values(), strict=True))
    if kind == "csv":
        text = io.StringIO(newline="")
        # Programs read 2400 and not 2,400.
        plain = [
            [re.sub(r"(?<=\d),(?=\d{3}\b)", "", cell) if _NUMBER.match(cell) else cell for cell in row] for row in rows
        ]
        csv.writer(text).writerows([list(columns), *plain])
        return text.getvalue()
    if kind == "md":
        return markdown_table(list(columns), rows) + "\n"
    lines = [" & ".join(map(_latex, row)) + r" \\" for row in [list(columns), *rows]]
    head = f"\\begin{{tabular}}{{{'l' * len(columns)}}}\n\\hline\n{lines[0]}\n\\hline"
    return "\n".join([head, *lines[1:], r"\hline", r"\end{tabular}", ""])


def curves_of(groups: Sequence[Group], metric: str) -> bytes:
    """A picture of the groups' means over the rounds, with a band of one standard deviation."""
    curves = {group.name: mean_curve(group.runs, metric) for group in groups}
    bands = {group.name: deviations(group.runs, metric) for group in groups if len(group.runs) > 1}
    return plots.as_png(plots.curves_figure(curves, metric, 7.5, 4.2, bands))


def mean_curve(runs: Sequence[Run], metric: str) -> tuple[list[float], list[float]]:
    """The mean of a metric over the runs, in the rounds that all of them have."""
    rounds, values = _together(runs, metric)
    return rounds, [statistics.fmean(one) for one in values]


def deviations(runs: Sequence[Run], metric: str) -> list[float]:
    """The standard deviation of a metric over several runs, in the rounds that all of them have."""
    return [statistics.stdev(one) for one in _together(runs, metric)[1]]


def _together(runs: Sequence[Run], metric: str) -> tuple[list[float], list[list[float]]]:
    curves = [dict(zip(*one.metric(metric), strict=True)) for one in runs]
    rounds = [number for number in curves[0] if all(number in curve for curve in curves)]
    return [float(number) for number in rounds], [[curve[number] for curve in curves] for number in rounds]


def _spread(values: Sequence[float | None], form: str, absent: str = "-") -> str:
    """The mean of the numbers, and their standard deviation if there are several."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    if not known:
        return absent
    mean = format(statistics.fmean(known), form)
    if len(known) > 1 and len(set(known)) > 1:
        mean = f"{mean} ± {statistics.stdev(known):.2g}"
    return mean if len(known) == len(values) else f"{mean} ({len(known)} of {len(values)})"


def _latex(text: str) -> str:
    return "".join(_LATEX.get(mark, mark) for mark in text)


def _algorithm(run: Run) -> str:
    return run.settings.get("algorithm", "centralised").partition("(")[0]


def _status(run: Run) -> str:
    return str(run.facts.get("status", "?")).partition(":")[0]


def _finite(run: Run, metric: str) -> list[tuple[float, int]]:
    rounds, values = run.metric(metric)
    return [(value, number) for number, value in zip(rounds, values, strict=True) if math.isfinite(value)]


def _best(run: Run, metric: str, is_higher: bool) -> tuple[float | None, int | None]:
    sign = 1 if is_higher else -1
    return max(_finite(run, metric), key=lambda pair: sign * pair[0], default=(None, None))


def _reached(run: Run, metric: str, target: float, is_higher: bool) -> int | None:
    reached = [number for value, number in _finite(run, metric) if (value >= target if is_higher else value <= target)]
    return reached[0] if reached else None
