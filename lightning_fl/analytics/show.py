"""Formats answers for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table

from lightning_fl.analytics.analysis import Analysis, describe
from lightning_fl.analytics.question import Answer

MAX_NUMBERS = 8


def as_table(analysis: Analysis) -> Table:
    """The answers as a table, one row per figure."""
    clients, sums = analysis.num_clients, analysis.num_steps
    table = Table(title=f"Answers of {clients} client{'s' * (clients != 1)}, by {sums} sum{'s' * (sums != 1)}")
    for name in ("question", "of", "rows", "figure", "answer"):
        table.add_column(name, justify="right" if name in ("rows", "answer") else "left", overflow="fold")
    for question, answer in zip(analysis.questions, analysis.answers, strict=True):
        title = describe(question)
        for of, rows, figure, value in _rows(answer):
            table.add_row(title, of, rows, figure, value)
            title = ""
        table.add_section()
    return table


def _rows(answer: Answer, of: str = "all") -> Iterator[tuple[str, str, str, str]]:
    rows = f"{answer.n:g}"
    if answer.withheld:
        yield of, "", "withheld", answer.withheld
        return
    for figure, value in answer.values.items():
        yield of, rows, figure, number(value)
        of, rows = "", ""
    for name, part in answer.parts.items():
        if isinstance(part, Answer):
            yield from _rows(part, name)
        else:
            yield of, rows, name, number(part)
            of, rows = "", ""


def number(value: Any) -> str:
    """A short string for a number, a list or a record."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {number(item)}" for name, item in value.items())
    if isinstance(value, list | tuple):
        more = f", ... ({len(value)})" if len(value) > MAX_NUMBERS else ""
        return ", ".join(map(number, value[:MAX_NUMBERS])) + more
    return f"{value:.6g}" if isinstance(value, float) else str(value)
