"""Refused calls."""

from __future__ import annotations

import json
import re
from typing import Any


class Refused(Exception):
    """A refused call.

    Args:
        status: The HTTP status.
        reason: The reason, for the silo's user and the audit log.
        facts: Further fields, for the silo's program.
    """

    def __init__(self, status: int, reason: str, **facts: Any) -> None:
        super().__init__(reason)
        self.status = status
        self.facts = {"error": reason, **facts}


def json_object(body: bytes, **facts: Any) -> dict[str, Any]:
    """The JSON object in the body of a call.

    Raises:
        Refused: 400 with the facts, if the body is not a JSON object.
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
        Refused: 400 if it is not a number, has more than 15 digits, or is less than ``minimum``.
    """
    if not re.fullmatch(r"-?[0-9]{1,15}", text) or int(text) < minimum:
        raise Refused(400, f"A number of at least {minimum} is missing.")
    return int(text)
