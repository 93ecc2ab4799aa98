"""An audit log in which changing, removing or inserting a line breaks the chain of the lines after it."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import threading
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

START = "0" * 64


class AuditLog:
    """Lines of JSON, each with the SHA-256 of the line before.

    Args:
        path: The file; it is only ever appended to.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._last = START
        # A round is closed in a thread of its own, while silos join and are refused.
        self._lock = threading.Lock()
        if path.exists():
            data = path.read_bytes()
            # A line without an end was being written when the process died; its event never happened.
            whole = data[: data.rfind(b"\n") + 1]
            if whole != data:
                with path.open("r+b") as file:
                    file.truncate(len(whole))
            lines = whole.splitlines()
            self._last = hashlib.sha256(lines[-1]).hexdigest() if lines else START

    def append(self, event: str, **facts: Any) -> None:
        """Appends a line and waits until it is on the disk."""
        with self._lock:
            self._append(event, facts)

    def _append(self, event: str, facts: Mapping[str, Any]) -> None:
        time = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        line = json.dumps({"time": time, "event": event, **facts, "previous": self._last}).encode()
        with self.path.open("ab", buffering=0) as file:
            end = file.tell()
            try:
                if file.write(line + b"\n") <= len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(file.fileno())
            except OSError:
                file.truncate(end)  # a line that was not written completely would break the chain
                raise
        self._last = hashlib.sha256(line).hexdigest()


def verify(path: Path) -> tuple[int, str]:
    """Checks the chain of an audit log.

    Returns:
        The number of lines, and the digest of the last one: noted elsewhere, it shows later whether lines are missing
        at the end.

    Raises:
        ValueError: If a line was changed, removed or inserted; the message names the first one.
    """
    previous, number = START, 0
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            found = json.loads(line)["previous"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"Line {number} of {path} is not a line of an audit log.") from error
        if found != previous:
            raise ValueError(
                f"The chain of {path} breaks at line {number}: it does not follow from the line before. A line was "
                "changed, taken out or put in."
            )
        previous = hashlib.sha256(line).hexdigest()
    return number, previous
