"""Calls that are not answered."""

from __future__ import annotations

import json
import re
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


def integer(text: str, minimum: int = 0) -> int:
    """A number in the address or headers of a call.

    Raises:
        Refused: 400 if it is none, has more than 15 digits, or is less than ``minimum``.
    """
    if not re.fullmatch(r"-?[0-9]{1,15}", text) or int(text) < minimum:
        raise Refused(400, f"A number of at least {minimum} is missing.")
    return int(text)
