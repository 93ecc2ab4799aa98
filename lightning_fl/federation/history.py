"""The entry of a finished round in ``strategy.history``, and the figures in it that go to the loggers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from lightning_fl.federation.round import RoundResult
from lightning_fl.schedules import Flush
from lightning_fl.types import ClientId

CLIENT_FIGURES = ("num_clients", "num_examples", "num_steps", "update_spread", "num_bytes")
"""Figures that disclose exact facts about the clients of a round; so does its duration."""

RANK_FIGURES = ("fl/num_bytes", "fl/seconds_")
"""Prefixes of the figures that differ from rank to rank."""


class History(list[dict[str, Any]]):
    """One entry for each finished round; a notebook shows it as a table."""

    MAX_ROWS = 20
    """Maximum number of rounds in the table, the last ones."""

    def _repr_html_(self) -> str:
        shown = self[-self.MAX_ROWS :]
        names = [name for name in (shown[-1] if shown else {}) if isinstance(shown[-1][name], int | float | str | list)]
        rows = [[entry.get(name) for name in names] for entry in shown]
        before = f"<p>The last {len(shown)} of {len(self)} rounds.</p>" if len(shown) < len(self) else ""
        return before + html_table(names, rows) if self else "<p>No round has been finished.</p>"


def html_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A plain HTML table; all text is escaped, since clients' names may contain anything."""

    def cell(value: Any) -> str:
        if isinstance(value, list):
            return ", ".join(map(str, value[:5])) + (", ..." if len(value) > 5 else "")
        return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)

    head = "".join(f"<th>{escape(name.replace('_', ' '))}</th>" for name in columns)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell(value))}</td>' for value in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def history_entry(
    round: int, result: RoundResult, dropped: Sequence[ClientId], flush: Flush | None = None
) -> dict[str, Any]:
    """The entry of a round in ``strategy.history``: plain values, the same on every rank except for the times.

    Args:
        round: Number of the round.
        result: The round's result.
        dropped: Stragglers that were left out.
        flush: The updates that the round has received on the simulated clock; None if there is none. In the entry,
            ``clock`` is the second at which the round closed, and ``staleness`` the number of updates that were 0, 1,
            2, ... server updates old.
    """
    report = result.report
    return {
        "round": round,
        "num_clients": result.aggregate.num_clients,
        "num_examples": report.num_examples,
        "num_steps": report.num_steps,
        "refused": report.refused,
        "lost": report.lost,
        "failed": [client for client, _ in report.failed],
        "empty": report.empty,
        "dropped": list(dropped),
        "update_norm": result.norm,
        "update_spread": result.spread,
        "num_bytes": result.num_bytes,
        "seconds": result.seconds,
        **({} if flush is None else {"clock": flush.seconds, "staleness": flush.staleness(round)}),
        **result.closing.facts,
    }


def figures(entry: Mapping[str, Any], hides_clients: bool = False) -> dict[str, float]:
    """The numbers of a round's entry that go to the loggers.

    Args:
        entry: The entry.
        hides_clients: Whether to leave out exact facts about the clients.
    """
    hidden = CLIENT_FIGURES if hides_clients else ()
    left_out = {"fl/left_out": len(entry["left_out"])} if "left_out" in entry else {}
    numbers = {name: value for name, value in entry.items() if isinstance(value, int | float) and name not in hidden}
    # The duration of a round grows with the number of its clients.
    seconds = {} if hides_clients else {f"fl/seconds_{phase}": value for phase, value in entry["seconds"].items()}
    return {**{f"fl/{name}": value for name, value in numbers.items()}, **left_out, **seconds}


def left_out(entry: Mapping[str, Any]) -> dict[str, int]:
    """Number of clients of a round's cohort that were left out, by reason."""
    return {reason: len(entry[reason]) for reason in ("refused", "failed", "empty", "dropped", "lost")}


def words(entry: Mapping[str, Any]) -> dict[str, str]:
    """The text values of a round's entry, which are passed to the loggers once."""
    return {f"fl/{name}": value for name, value in entry.items() if isinstance(value, str)}
