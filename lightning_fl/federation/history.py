"""The entry of a finished round in ``strategy.history``, and what of it goes to the loggers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from lightning_fl.federation.round import RoundResult
from lightning_fl.schedules import Flush
from lightning_fl.types import ClientId

CLIENT_FIGURES = ("num_clients", "num_examples", "num_steps", "update_spread", "num_bytes")
"""Figures that disclose exact facts about the clients of a round; so does the time that it took."""

RANK_FIGURES = ("fl/num_bytes", "fl/seconds_")
"""How the names of the figures begin that each rank has of its own."""


class History(list[dict[str, Any]]):
    """One entry for each finished round, which a notebook shows as a table."""

    MAX_ROWS = 20
    """Rounds that are shown; of more the last ones."""

    def _repr_html_(self) -> str:
        shown = self[-self.MAX_ROWS :]
        names = [name for name in (shown[-1] if shown else {}) if isinstance(shown[-1][name], int | float | str | list)]
        rows = [[entry.get(name) for name in names] for entry in shown]
        before = f"<p>The last {len(shown)} of {len(self)} rounds.</p>" if len(shown) < len(self) else ""
        return before + html_table(names, rows) if self else "<p>No round has been finished.</p>"


def html_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A plain table, with all text escaped: names of clients may be anything."""

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
    """The entry of a round in ``strategy.history``: plain values, the same on every rank except for the seconds.

    Args:
        round: Number of the round.
        result: The round's result.
        dropped: Stragglers that were left out.
        flush: What the round has taken in on the simulated clock; None if there is none. ``clock`` is then the second
            at which the round has closed, ``staleness`` how many updates were 0, 1, 2, ... server updates old.
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
    # The time that a round takes grows with the number of its clients.
    seconds = {} if hides_clients else {f"fl/seconds_{phase}": value for phase, value in entry["seconds"].items()}
    return {**{f"fl/{name}": value for name, value in numbers.items()}, **left_out, **seconds}


def left_out(entry: Mapping[str, Any]) -> dict[str, int]:
    """How many clients of a round's cohort do not count, by reason."""
    return {reason: len(entry[reason]) for reason in ("refused", "failed", "empty", "dropped", "lost")}


def words(entry: Mapping[str, Any]) -> dict[str, str]:
    """The text values of a round's entry, which the loggers get once."""
    return {f"fl/{name}": value for name, value in entry.items() if isinstance(value, str)}
