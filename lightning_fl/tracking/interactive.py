"""The parts of a page that its script draws: curves to zoom into, clients to filter, runs side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from lightning_fl.tracking.run import Row, Run, to_json

SCRIPT = Path(__file__).with_name("page.js")
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
"""What a page may do: show what it holds itself, and send no request, whatever text is in it."""
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
    """Curves to zoom into.

    Args:
        lines: The curves by name.
        x: What the x-axis shows.
        y: What the y-axis shows.
        instead: What stands there without scripts, such as in print.
    """
    content = [
        {"name": name, "x": _thinned(list(places)), "y": _thinned(list(values))}
        for name, (places, values) in lines.items()
    ]
    return _part("curves", content, instead, x=x, y=y)


def clients(rows: Sequence[Row], instead: str) -> str:
    """Clients, each with its rows; of very many rows the last rounds.

    Args:
        rows: One for each client and round.
        instead: What stands there without scripts.
    """
    newest = sorted(rows, key=lambda row: row["round"])[-MAX_CLIENT_ROWS:]
    names = dict.fromkeys(name for row in newest for name in row if name != "rank")
    return _part("clients", {"columns": list(names), "rows": [[row.get(n) for n in names] for row in newest]}, instead)


def side_by_side(runs: Sequence[Run], names: Sequence[str], metric: str | None) -> str:
    """Runs to choose from, with the checkboxes ``data-run`` of the page.

    Args:
        runs: The runs.
        names: What they are called.
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
    """A metric's values, and at which of the run's rounds they were measured."""
    at = _thinned([place for place, row in enumerate(run.rounds) if metric in row.get("metrics", {})])
    return {"at": at, "y": [run.rounds[place]["metrics"][metric] for place in at]}


def _thinned(values: list[Any]) -> list[Any]:
    every = -(-len(values) // MAX_POINTS)
    return values if every <= 1 else [*values[:-1:every], values[-1]]


def _part(kind: str, content: Any, instead: str, **facts: str) -> str:
    data = "".join(f' data-{name}="{escape(value)}"' for name, value in facts.items())
    chart = ' class="chart"' if kind == "curves" else ""
    return f'<div{chart} data-part="{kind}"{data} data-content="{escape(to_json(content))}">{instead}</div>'
