"""A self-contained HTML page with one row per run, and a comparison of selected runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

from lightning_fl.tracking.interactive import side_by_side
from lightning_fl.tracking.markup import number, page
from lightning_fl.tracking.metrics import best_metric, mode_of
from lightning_fl.tracking.report import duration, started
from lightning_fl.tracking.run import Run, write_file

REPORT = "report.html"
MAX_CHARACTERS = 100
COLUMNS = ("run", "started", "status", "algorithm", "clients", "rounds", "metric", "last", "best", "time")


def write_index(runs: Sequence[Run], path: Path) -> None:
    """Writes the page, the newest run first; a run's name links to its report, if there is one.

    Args:
        runs: The runs.
        path: The page, in a folder above theirs.
    """
    newest_first = sorted(runs, key=lambda run: str(run.facts.get("started", "")), reverse=True)
    names = [os.path.relpath(run.path, path.parent) for run in newest_first]
    rows = "\n".join(f"<tr>{_cells(run, name)}</tr>" for run, name in zip(newest_first, names, strict=True))
    head = "".join(f"<th>{name}</th>" for name in COLUMNS)
    table = f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>\n{rows}\n</tbody></table></div>'
    title = f"{len(runs)} runs in {path.parent.resolve().name}"
    hint = "<p>A name links to a run's report, if <code>lightning-fl report RUN</code> has written it.</p>"
    measured = [run for run in newest_first if run.metric_names]
    try:
        metric = best_metric(measured) if measured else None
    except ValueError:  # the runs have no common metric
        metric = best_metric(measured[:1])
    compared = f"<section><h2>Side by side</h2>{side_by_side(newest_first, names, metric)}</section>\n"
    write_file(path, page(title, f"<h1>{escape(title)}</h1>\n<section>{table}{hint}</section>\n{compared}"))


def _cells(run: Run, name: str) -> str:
    address = escape(f"./{quote(name)}/{REPORT}")
    name = escape(name)
    box = f'<input type="checkbox" checked data-run aria-label="{name}"> '
    if (run.path / REPORT).is_file():
        name = f'<a href="{address}">{name}</a>'
    facts = [started(run), str(run.facts.get("status", "?")), run.algorithm]
    facts += [run.settings.get("num_clients", "-"), f"{len(run.rounds):,}", *_metric(run)]
    facts.append("-" if run.seconds is None else duration(run.seconds))
    facts = [fact if len(fact) <= MAX_CHARACTERS else f"{fact[: MAX_CHARACTERS - 1]}\u2026" for fact in facts]
    whole = {"started", "time"}
    cells = (
        f"<td{' class=whole' * (column in whole)}>{escape(fact)}</td>"
        for column, fact in zip(COLUMNS[1:], facts, strict=True)
    )
    return f"<td class=whole>{box}{name}</td>{''.join(cells)}"


def _metric(run: Run) -> list[str]:
    if not run.metric_names:
        return ["-"] * 3
    name = best_metric([run])
    values = [value for value in run.metric(name)[1] if value == value]
    if not values:
        return [name, "nan", "-"]
    ends = {"min": number(min(values)), "max": number(max(values))}
    mode = mode_of(name, [run])
    return [name, number(values[-1]), ends[mode] if mode else f"{ends['min']} to {ends['max']}"]
