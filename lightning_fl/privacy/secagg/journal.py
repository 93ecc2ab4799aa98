"""The retry trap: a vector must not leave twice among different participants, or the two sums differ by one update."""

from __future__ import annotations

import os
from pathlib import Path

from lightning_fl.privacy.secagg.errors import RetryRefused


class Journal:
    """Remembers among whom each vector has left.

    A vector is known by the global model from which it was trained: training repeats, so the same model gives the same
    vector again, also after a restart.

    Args:
        path: A file that outlives the process, for silos; None remembers in memory only.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._rosters: dict[str, str] = {}
        if path is not None and path.exists():
            lines = (line.split() for line in path.read_text().splitlines())
            self._rosters = {line[0]: line[1] for line in lines if len(line) == 2}

    def claim(self, vector: bytes, roster: bytes) -> None:
        """To be called before a masked vector leaves.

        Args:
            vector: What the vector is known by.
            roster: A hash of the identities among which it is about to leave.

        Raises:
            RetryRefused: If it may have left among others before.
        """
        before = self._rosters.get(vector.hex())
        if before == roster.hex():
            return
        if before is not None:
            raise RetryRefused(
                "An update trained from this global model has left before, among other participants. If it left again, "
                "the difference of the two sums would tell single updates. Go on with the same participants as then, "
                "or from another model: an earlier checkpoint does not help, another seed does."
            )
        self._rosters[vector.hex()] = roster.hex()
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(f"{vector.hex()} {roster.hex()}\n")
                file.flush()
                os.fsync(file.fileno())
