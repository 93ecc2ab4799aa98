"""Calls that are not answered."""

from __future__ import annotations

import json
from typing import Any


class Refused(Exception):
    """A call that is not answered.

    Args:
        status: The HTTP status.
        reason: Why, as the silo and the audit log read it.
        facts: More, for the silo's program.
    """

    def __init__(self, status: int, reason: str, **facts: Any) -> None:
        super().__init__(reason)
        self.status = status
        self.facts = {"error": reason, **facts}


def json_object(body: bytes, **facts: Any) -> dict[str, Any]:
    """The JSON object in the body of a call.

    Raises:
        Refused: 400 with the facts, if it holds something else.
    """
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused(400, "The body is no JSON.", **facts) from error
    if not isinstance(value, dict):
        raise Refused(400, "The body is not a JSON object.", **facts)
    return value
