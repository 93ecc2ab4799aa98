"""What is kept and logged of a finished round."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_fl.strategies.round import RoundResult
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
        "failed": [client for fields in told for client, _ in fields["failed"]],
        "empty": [client for fields in told for client in fields["empty"]],
        "dropped": list(dropped),
        "update_norm": result.norm,
        "update_spread": result.spread,
        "num_bytes": result.num_bytes,
        "seconds": result.seconds,
    }


def figures(entry: dict[str, Any]) -> dict[str, float]:
    """What goes to the loggers of a round's entry."""
    names = ("num_clients", "num_examples", "num_steps", "update_norm", "update_spread", "num_bytes")
    seconds = {f"fl/seconds_{phase}": value for phase, value in entry["seconds"].items()}
    return {"fl/round": entry["round"], **{f"fl/{name}": entry[name] for name in names}, **seconds}
