"""Guards against retries that leak: the same vector summed with two different sets of clients reveals an update."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import BinaryIO

from lightning_fl.os_differences import lock_file
from lightning_fl.privacy.secagg.errors import RetryRefused

_LINE = re.compile(r"([0-9a-f]+) ([0-9a-f]{64})")
_SENT_BEFORE = (
    "An update trained from this global model was sent before, to be summed with those of other participants. If it "
    "were sent again, the difference of the two sums could reveal single updates. Continue with the same participants "
    "as before, each with an update, or from another model: another seed helps, an earlier checkpoint does not."
)


class Journal:
    """Records with which clients each vector was summed. A resource with a single owner, like an open file.

    A vector is identified by the global model from which it was trained: training is repeatable, so the same model
    gives the same vector again, even after a restart.

    Args:
        path: A file that outlives the process and may be shared by several, for silos. None: memory only.

    Raises:
        ValueError: If the file is damaged.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._rosters: dict[str, str] = {}
        if path is not None and path.exists():
            self._rosters = self._parse(path.read_bytes())

    def claim(self, vector_id: bytes, roster: bytes) -> None:
        """Records a vector before it is sent, and refuses one that was summed with others before.

        Args:
            vector_id: Identifies the vector.
            roster: A hash of the identities whose vectors are about to be summed, including its own.

        Raises:
            RetryRefused: If the vector may have been summed with a different set of clients before.
            ValueError: If the file is corrupt.
        """
        if self.path is None:
            self._check_and_note(vector_id.hex(), roster.hex())
            return
        with os.fdopen(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600), "r+b") as file:
            lock_file(file.fileno(), wait=True)  # until the file is closed: another process may run for the same silo
            self._claim_in(file, vector_id.hex(), roster.hex())

    def check(self, vector_id: bytes) -> None:
        """Refuses a vector that was sent before, without recording anything.

        Raises:
            RetryRefused: If it was.
            ValueError: If the file is corrupt.
        """
        if self.path is not None and self.path.exists():
            self._rosters = self._parse(self.path.read_bytes())
        if vector_id.hex() in self._rosters:
            raise RetryRefused(_SENT_BEFORE)

    def _claim_in(self, file: BinaryIO, vector_id: str, roster: str) -> None:
        content = file.read()
        # Read again under the lock: another process of the silo may have sent a vector since.
        self._rosters = self._parse(content)
        if self._check_and_note(vector_id, roster):
            # A crash or an editor may have lost the last newline; two lines in one would make the file unreadable.
            start = "" if not content or content.endswith(b"\n") else "\n"
            file.write(f"{start}{vector_id} {roster}\n".encode())
            file.flush()
            os.fsync(file.fileno())  # the line must be on disk before the vector is on the network

    def _check_and_note(self, vector_id: str, roster: str) -> bool:
        """Returns whether the vector is new."""
        before = self._rosters.get(vector_id)
        if before == roster:
            return False
        if before is not None:
            raise RetryRefused(_SENT_BEFORE)
        self._rosters[vector_id] = roster
        return True

    def _parse(self, content: bytes) -> dict[str, str]:
        rosters: dict[str, str] = {}
        for number, line in enumerate(content.decode("utf-8", "replace").splitlines(), start=1):
            match = _LINE.fullmatch(line)
            if match is None or rosters.setdefault(match[1], match[2]) != match[2]:
                raise ValueError(
                    f"Line {number} of {self.path} is damaged, so a vector that was sent before might be sent again. "
                    "Restore the file. If it is lost, remove that line and start from a model from which this silo "
                    "has never trained: another seed."
                )
        return rosters
