"""A coordinator in a rank's own process: it answers the calls of the ranks, which its threads bring."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from lightning_fl.communication.line import NOTHING
from lightning_fl.coordinator.refused import Refused, integer
from lightning_fl.coordinator.service import START, Coordinator

HOLD_S = 20.0
"""How long a call is held that waits for something to happen."""
TICK_S = 0.05
SILENT_S = 90.0
"""A rank that trains says every half minute that it is there; one that is silent for so long is not waited for."""
T = TypeVar("T")
log = logging.getLogger("lightning_fl.network")


class Desk:
    """Answers the calls of ranks, as :class:`~lightning_fl.coordinator.http_server.HttpServer` those over a network.

    Args:
        coordinator: Whose answers they are.
        names: The silos, in the order of the ranks.
    """

    def __init__(self, coordinator: Coordinator, names: Sequence[str]) -> None:
        self.coordinator = coordinator
        self.names = names
        self.present: set[str] = set()
        """The silos that have joined, and neither left nor died."""
        self._lock = threading.RLock()
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._run, name="coordinator", daemon=True)
        self._error: BaseException | None = None
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._ends.wait(TICK_S):
                with self._lock:
                    if self.coordinator.step(time.monotonic()):
                        self.coordinator.begin_close()
                        self.coordinator.close()
        except BaseException as error:  # told to whoever calls
            log.exception("The rounds can't go on.")
            self._error = error

    def close(self, error: BaseException | None = None) -> None:
        """Ends the coordinator, once the other ranks have read what the last round has become.

        Args:
            error: Why this rank ends before its time; the others are told instead of waited for.
        """
        self._error = self._error or error
        while self._error is None and any(map(self._is_there, self.present.copy())):
            time.sleep(TICK_S)
        self._ends.set()
        self._thread.join()
        self.coordinator.store.close()

    def _is_there(self, silo: str) -> bool:
        return time.monotonic() - self.coordinator.seen.get(silo, 0.0) < SILENT_S

    # ---- what lines ask of it

    @property
    def limit(self) -> int:
        """The most bytes that a call may bring."""
        return 1 << 40 if self.coordinator.start is None else self.coordinator.max_update_bytes

    def answer(self, rank: int, fields: Mapping[str, Any], body: Tensor) -> tuple[Mapping[str, Any], Tensor]:
        """The answer to a call, whose fields are those of HTTP: method, path and, where it has one, JSON."""
        silo = self.names[rank]
        try:
            if self._error is not None:
                raise Refused(503, f"Rank 0, which keeps the model, has failed: {self._error}")
            status, facts, content = self._answer(silo, str(fields["method"]), str(fields["path"]), fields, body)
        except Refused as refused:
            return {"status": refused.status, "facts": refused.facts}, NOTHING
        return {"status": status, "facts": facts}, content

    def lost(self, rank: int) -> None:
        """A rank's process has ended."""
        silo = self.names[rank]
        with self._lock:
            if silo in self.present and not self._ends.is_set():
                log.warning(f"Silo {silo} is lost; the others go on training, and it may come back.")
                self._leave(silo, "its process has ended")

    def _leave(self, silo: str, reason: str) -> None:
        self.present.discard(silo)
        self.coordinator.leave(silo, reason)

    def _answer(
        self, silo: str, method: str, path: str, fields: Mapping[str, Any], body: Tensor
    ) -> tuple[int, dict[str, Any], Tensor]:
        coordinator, place, _, query = self.coordinator, *path.partition("?")
        match [method, *place.removeprefix("/v1/").split("/")]:
            case ["GET", "rounds"]:
                after = integer(query.removeprefix("after="), minimum=-1)
                opening = self._hold(lambda: coordinator.next_round(silo, after, time.monotonic()))
                return (204, {}, NOTHING) if opening is None else (200, {}, bytes_of(opening.encode()))
            case ["GET", "rounds", number, topic]:
                round = integer(number)
                file = self._hold(lambda: coordinator.outcome(round, topic, silo), _read)
                return (204, {}, NOTHING) if file is None else (200, {}, file)
            case ["GET", "states", digest]:
                with self._lock:
                    if not coordinator.may_read(digest):
                        raise Refused(404, "There is no such state.")
                    return 200, {}, _read(coordinator.store.state_path(digest))
            case ["PUT", "start", digest]:
                self._take_in(silo, None, START, digest, body)
                return 200, {}, NOTHING
            case ["PUT", "rounds", number, topic, digest] if topic != START:
                self._take_in(silo, integer(number), topic, digest, body)
                return 200, {}, NOTHING
            case ["POST", what]:
                with self._lock:
                    return 200, self._note(silo, what, fields.get("json") or {}), NOTHING
        raise Refused(404, "There is no such place.")

    def _note(self, silo: str, what: str, content: Mapping[str, Any]) -> dict[str, Any]:
        if what == "join":
            answer = self.coordinator.join(silo, content, time.monotonic())
            self.present.add(silo)
            return {**answer, "time": time.time()}
        if what == "alive":
            return {"round": self.coordinator.alive(silo, time.monotonic())}
        if what == "leave":
            self._leave(silo, str(content.get("reason", "")))
            return {}
        raise Refused(404, "There is no such place.")

    def _hold(self, ask: Callable[[], Any], then: Callable[[Any], T] = lambda found: found) -> T | None:
        """Asks until there is an answer; None if there is none for long."""
        until = time.monotonic() + HOLD_S
        while time.monotonic() < until and not self._ends.is_set():
            with self._lock:
                found = ask()
                if found is not None:
                    return then(found)
            time.sleep(TICK_S)
        return None

    def _take_in(self, silo: str, round: int | None, topic: str, digest: str, body: Tensor) -> None:
        coordinator = self.coordinator
        with self._lock:
            upload = coordinator.target(silo, round, topic, digest, len(body))
            if upload.ok.exists():
                return
            upload.part.write_bytes(body.numpy().data)
            coordinator.progressed(silo, time.monotonic())
            try:
                coordinator.check(upload, topic)
            except Refused as refused:
                coordinator.refuse(upload, topic, str(refused))
                raise
        while not self._ends.is_set() and self._error is None:
            with self._lock:
                if not coordinator.is_busy(topic):
                    coordinator.accept(upload, round, topic, time.monotonic())
                    return
            time.sleep(TICK_S)


def bytes_of(data: bytes) -> Tensor:
    """Bytes as a line takes them."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else NOTHING


def _read(path: Path) -> Tensor:
    return bytes_of(path.read_bytes())
