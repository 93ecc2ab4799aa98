"""The ranks of a launch as asynchronous silos: the first rank keeps the model, and trains like the others."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from lightning_fl.communication.line import Line, Lines, Meeting, OwnLine, Transport
from lightning_fl.coordinator.audit import AuditLog
from lightning_fl.coordinator.buffered_service import BufferedCoordinator
from lightning_fl.coordinator.desk import Desk
from lightning_fl.coordinator.line_client import LineClient
from lightning_fl.coordinator.machine import Rules
from lightning_fl.coordinator.policy import Policy
from lightning_fl.coordinator.silo import NetworkFederation
from lightning_fl.coordinator.store import Store

FOLDER = "asynchronous"
YEAR_S = 365 * 24 * 3600.0
MakeCoordinator = Callable[[Rules, Store, AuditLog, float], BufferedCoordinator]


class LaunchFederation(NetworkFederation):
    """A rank of a launch in asynchronous rounds.

    The first rank answers the others in threads while it trains. Its folder, ``asynchronous/<number>``, is that of a
    coordinator; it records which update arrived when and from which version it started, for
    :class:`~lightning_fl.schedules.Recorded`.

    Args:
        meeting: The meeting of the ranks.
        transport: The transport to the first rank.
        root: The parent of the folder.
        resumes: Whether the first rank continues in its last folder.
        rounds: Number of rounds.
        make: Creates the coordinator.
    """

    def __init__(
        self,
        meeting: Meeting,
        transport: Transport,
        root: Path,
        resumes: bool,
        rounds: int,
        make: MakeCoordinator,
    ) -> None:
        self._lines: Lines | None = None
        self._desk: Desk | None = None
        if meeting.rank == 0:
            number = next_number(root / FOLDER, resumes)
            journal = root / FOLDER / str(number)
            # The first round begins with all ranks; later ones wait for no rank longer than the schedule says.
            start_s = meeting.timeout.total_seconds()
            rules = Rules(tuple(meeting.names), rounds, 1, start_s, YEAR_S, YEAR_S)
            coordinator = make(rules, Store(journal), AuditLog(journal / "audit.jsonl"), time.monotonic())
            self._desk = Desk(coordinator, meeting.names)
            self._lines = meeting.listen(transport, self._desk)
            meeting.tell(str(number))
            line: Line = OwnLine(self._desk)
        else:
            line = meeting.line(transport)
            number = int(meeting.told())
        self._line = line
        self.journal = root / FOLDER / str(number)
        """The coordinator's folder, on the first rank's machine."""
        name = meeting.names[meeting.rank]
        self._begin(LineClient(line), name, self.journal / "silos" / name, Policy())

    def leave(self, reason: str, error: BaseException | None = None) -> None:
        super().leave(reason)
        self._line.close()
        if self._desk is not None and self._lines is not None:
            self._desk.close(error)
            self._lines.close()
            self._desk = self._lines = None


def next_number(folder: Path, resumes: bool) -> int:
    """The number of a run's folder: a new one, or the last one if the run is resumed."""
    numbers = [int(path.name) for path in folder.glob("*") if path.name.isdigit()]
    return max(numbers, default=-1) + (not (resumes and numbers))
