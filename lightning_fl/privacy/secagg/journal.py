"""The retry trap: a vector must not leave twice with different others, or the two sums differ by one update."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import BinaryIO

from lightning_fl.privacy.secagg.errors import RetryRefused

_LINE = re.compile(r"([0-9a-f]+) ([0-9a-f]{64})")


class Journal:
    """Remembers with whom each vector has been summed.

    A vector is known by the global model from which it was trained: training repeats, so the same model gives the same
    vector again, also after a restart.

    Args:
        path: A file that outlives the process and may be shared by several, for silos; None remembers in memory only.

    Raises:
        ValueError: If the file is damaged.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._rosters: dict[str, str] = {}
        if path is not None and path.exists():
            self._rosters = self._parse(path.read_bytes())

    def claim(self, vector: bytes, roster: bytes) -> None:
        """To be called before a masked vector leaves.

        Args:
            vector: What the vector is known by.
            roster: A hash of the identities of those whose vectors it is about to be summed with, itself among them.

        Raises:
            RetryRefused: If it may have been summed with others before.
            ValueError: If the file is damaged.
        """
        if self.path is None:
            self._check_and_note(vector.hex(), roster.hex())
            return
        import fcntl

        with os.fdopen(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600), "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed: another process may run for the same silo
            self._claim_in(file, vector.hex(), roster.hex())

    def _claim_in(self, file: BinaryIO, vector: str, roster: str) -> None:
        written = file.read()
        self._rosters = self._parse(written)
        if self._check_and_note(vector, roster):
            start = "" if not written or written.endswith(b"\n") else "\n"
            file.write(f"{start}{vector} {roster}\n".encode())
            file.flush()
            os.fsync(file.fileno())

    def _check_and_note(self, vector: str, roster: str) -> bool:
        """Whether the vector is new."""
        before = self._rosters.get(vector)
        if before == roster:
            return False
        if before is not None:
            raise RetryRefused(
                "An update trained from this global model has left before, together with those of other participants. "
                "If it left again, the difference of the two sums would tell single updates. Go on with the same "
                "participants as then, each with an update, or from another model: an earlier checkpoint does not "
                "help, another seed does."
            )
        self._rosters[vector] = roster
        return True

    def _parse(self, written: bytes) -> dict[str, str]:
        rosters: dict[str, str] = {}
        for number, line in enumerate(written.decode("utf-8", "replace").splitlines(), start=1):
            match = _LINE.fullmatch(line)
            if match is None or rosters.setdefault(match[1], match[2]) != match[2]:
                raise ValueError(
                    f"Line {number} of {self.path} is damaged, so a vector that was sent before might leave again. Put "
                    "the file back. If it is lost, remove that line, and start from a model from which this silo has "
                    "never trained: another seed."
                )
        return rosters
