"""What is kept and logged of a finished round."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_fl.federation.round import RoundResult
from lightning_fl.types import ClientId


def round_entry(round: int, result: RoundResult, dropped: Sequence[ClientId]) -> dict[str, Any]:
    """The entry of a round in ``strategy.history``: plain values, the same on every rank but for the seconds.

    Args:
        round: Number of the round.
        result: What the round gave.
        dropped: Stragglers that were left out.
    """
    told = [message.fields for message in result.reports]
    return {
        "round": round,
        "num_clients": result.aggregate.num_clients,
        "num_examples": sum(fields["num_examples"] for fields in told),
        "num_steps": sum(fields["num_steps"] for fields in told),
        "refused": result.refused,
        "lost": result.lost,
        "failed": [client for fields in told for client, _ in fields["failed"]],
        "empty": [client for fields in told for client in fields["empty"]],
        "dropped": list(dropped),
        "update_norm": result.norm,
        "update_spread": result.spread,
        "num_bytes": result.num_bytes,
        "seconds": result.seconds,
        **result.facts,
    }


OF_CLIENTS = ("num_clients", "num_examples", "num_steps", "update_spread", "num_bytes")
"""What tells exact facts about the clients of a round; so do the seconds that it took."""


def figures(entry: dict[str, Any], hides_clients: bool = False) -> dict[str, float]:
    """What goes to the loggers of a round's entry.

    Args:
        entry: The entry.
        hides_clients: Whether to leave out exact facts about the clients.
    """
    hidden = OF_CLIENTS if hides_clients else ()
    numbers = {name: value for name, value in entry.items() if isinstance(value, int | float) and name not in hidden}
    told = {} if hides_clients else entry["seconds"]
    seconds = {f"fl/seconds_{phase}": value for phase, value in told.items()}
    return {**{f"fl/{name}": value for name, value in numbers.items()}, **seconds}


def words(entry: dict[str, Any]) -> dict[str, str]:
    """What loggers are told once, in words."""
    return {f"fl/{name}": value for name, value in entry.items() if isinstance(value, str)}
