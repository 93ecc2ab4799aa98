"""The interactive parts of a page: zoomable curves, a filter for clients, a comparison of runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from lightning_fl.tracking.run import Row, Run, to_json

SCRIPT = Path(__file__).with_name("page.js")
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
"""Content security policy of a page: only inline content and no requests, whatever text the page contains."""
MAX_POINTS = 2000
MAX_CLIENT_ROWS = 50_000

STYLE = """
.chart svg { width: 100%; max-width: 760px; height: auto; display: block; background: var(--box); touch-action: none;
  cursor: crosshair; }
.chart text { font: 14px system-ui, sans-serif; fill: var(--soft); }
.chart .grid { stroke: var(--line); }
.chart .line { fill: none; stroke-width: 1.8; }
.chart .cursor { stroke: var(--soft); stroke-dasharray: 3 3; pointer-events: none; }
.chart .frame { fill: var(--accent); fill-opacity: .12; stroke: var(--accent); }
.told { min-height: 20px; font-size: 12.5px; color: var(--soft); }
.legend { display: flex; flex-wrap: wrap; gap: 2px 12px; max-height: 96px; overflow-y: auto; }
.legend button { border: 0; background: none; color: inherit; font: inherit; font-size: 12.5px; padding: 0;
  cursor: pointer; overflow-wrap: anywhere; text-align: left; }
.legend button.off { opacity: .35; }
.legend i { display: inline-block; width: 12px; height: 3px; margin: 0 5px 3px 0; }
@media (max-width: 520px) { .chart text { font-size: 19px; } }
.controls { display: flex; flex-wrap: wrap; gap: 8px 18px; margin-bottom: 8px; color: var(--soft); font-size: 13.5px; }
.controls select, .controls input { font: inherit; color: var(--ink); background: var(--page);
  border: 1px solid var(--line); border-radius: 5px; padding: 3px 6px; }
"""


def curves(lines: Mapping[str, tuple[Sequence[float], Sequence[float]]], x: str, y: str, instead: str) -> str:
    """Zoomable curves.

    Args:
        lines: The curves by name.
        x: Label of the x-axis.
        y: Label of the y-axis.
        instead: The fallback without scripts, for example in print.
    """
    content = [
        {"name": name, "x": _thinned(list(places)), "y": _thinned(list(values))}
        for name, (places, values) in lines.items()
    ]
    return _part("curves", content, instead, x=x, y=y)


def clients(rows: Sequence[Row], instead: str) -> str:
    """An explorer of clients and their rows; with very many rows, only the last rounds.

    Args:
        rows: One row per client and round.
        instead: The fallback without scripts.
    """
    newest = sorted(rows, key=lambda row: row["round"])[-MAX_CLIENT_ROWS:]
    names = dict.fromkeys(name for row in newest for name in row if name != "rank")
    return _part("clients", {"columns": list(names), "rows": [[row.get(n) for n in names] for row in newest]}, instead)


def side_by_side(runs: Sequence[Run], names: Sequence[str], metric: str | None) -> str:
    """A comparison of runs, selected by the page's checkboxes ``data-run``.

    Args:
        runs: The runs.
        names: Their display names.
        metric: The metric to show first.
    """
    return _part("runs", [_of_run(run, name) for run, name in zip(runs, names, strict=True)], "", metric=metric or "")


def _of_run(run: Run, name: str) -> dict[str, Any]:
    steps, total = [], 0.0
    for row in run.rounds:
        total += row.get("num_steps") or 0
        steps.append(total)
    return {
        "name": name,
        "settings": run.settings,
        "x": {
            "round": [row["round"] + 1 for row in run.rounds],
            "seconds": [row.get("time") for row in run.rounds],
            "local steps": steps,
        },
        "metrics": {metric: _measured(run, metric) for metric in run.metric_names},
    }


def _measured(run: Run, metric: str) -> dict[str, list[Any]]:
    """A metric's values, and the rounds in which they were measured."""
    at = _thinned([place for place, row in enumerate(run.rounds) if metric in row.get("metrics", {})])
    return {"at": at, "y": [run.rounds[place]["metrics"][metric] for place in at]}


def _thinned(values: list[Any]) -> list[Any]:
    every = -(-len(values) // MAX_POINTS)
    return values if every <= 1 else [*values[:-1:every], values[-1]]


def _part(kind: str, content: Any, instead: str, **facts: str) -> str:
    data = "".join(f' data-{name}="{escape(value)}"' for name, value in facts.items())
    chart = ' class="chart"' if kind == "curves" else ""
    return f'<div{chart} data-part="{kind}"{data} data-content="{escape(to_json(content))}">{instead}</div>'
