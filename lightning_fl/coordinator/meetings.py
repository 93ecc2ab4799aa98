"""Meetings of all silos outside the rounds: the coordinator passes their messages on, or sums, for questions.

A meeting lasts seconds and lives in memory. It begins when all silos have come, and ends when each has left, or when
one starts again, answers something else or not in time; the others are then told why. The time is passed in.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from lightning_fl.communication import Message
from lightning_fl.coordinator.audit import AuditLog
from lightning_fl.coordinator.refused import Refused
from lightning_fl.coordinator.wire import finite_error

Kind = Literal["gather", "sum"]
SUM = "sum"
"""Name of the tensor that is summed."""
SILENT_S = 60.0
"""A silo that has not asked for so long is not waiting for the others any more."""
MAX_ENDED = 100
_TOKEN = re.compile(r"[0-9a-f]{32}")


@dataclass
class Meeting:
    """A meeting of silos.

    Args:
        name: Its name, which nobody can guess.
        tokens: The token of each silo's process.
        seen: When each was last here.
        step: The number of the step that is open.
        kind: What becomes of its messages; None before the first has come.
        messages: Those that have come, by silo.
        outcome: What the last step has become.
        until: When the open step ends without those that have not answered.
        has_begun: Whether all have come.
        left: Those that have all answers.
    """

    name: str
    tokens: dict[str, str] = field(default_factory=dict)
    seen: dict[str, float] = field(default_factory=dict)
    step: int = 0
    kind: Kind | None = None
    messages: dict[str, bytes] = field(default_factory=dict)
    outcome: bytes = b""
    until: float = 0.0
    has_begun: bool = False
    left: set[str] = field(default_factory=set)


class Meetings:
    """The meetings of a federation, one after the other.

    Args:
        silos: The silos, all of which meet.
        seconds: How long a step waits for them.
        audit: Where beginnings and ends are written down.
    """

    def __init__(self, silos: Sequence[str], seconds: float, audit: AuditLog) -> None:
        self.silos, self.seconds, self.audit = sorted(silos), seconds, audit
        self.meeting: Meeting | None = None
        self.ended: dict[str, str] = {}
        """Why a meeting has ended, by its name and by its silos' tokens."""

    def come(self, silo: str, token: object, now: float) -> dict[str, object]:
        """A silo's process comes, or asks whether the others have.

        Args:
            silo: The silo.
            token: 32 hexadecimal digits, which the process has drawn.
            now: The time.

        Raises:
            Refused: 400 for another token, 410 if the meeting has ended.
        """
        if not isinstance(token, str) or not _TOKEN.fullmatch(token):
            raise Refused(400, "A meeting needs a token of 32 hexadecimal digits.")
        self.step(now)
        if token in self.ended:
            raise Refused(410, self.ended[token])
        meeting = self.meeting = self.meeting or Meeting(secrets.token_hex(16))
        if meeting.has_begun and meeting.tokens[silo] != token:
            if silo in meeting.left:  # it asks again, while others read the last answer
                return {"meeting": None, "waits_for": sorted(set(self.silos) - meeting.left)}
            self._end(f"Silo {silo!r} has started again. Ask again.")
            return self.come(silo, token, now)
        meeting.tokens[silo], meeting.seen[silo] = token, now
        if not meeting.has_begun and len(meeting.tokens) == len(self.silos):
            meeting.has_begun, meeting.until = True, now + self.seconds
            self.audit.append("meeting begun", silos=self.silos)
        waits_for = sorted(set(self.silos) - meeting.tokens.keys())
        return {"meeting": None if waits_for else meeting.name, "silos": self.silos, "waits_for": waits_for}

    def put(self, silo: str, name: str, step: int, kind: str, data: bytes, now: float) -> None:
        """Takes a silo's message for a step.

        Raises:
            Refused: 410 if the meeting is over, 422 if the message does not fit.
        """
        meeting = self._of(name)
        if step == meeting.step - 1:  # the answer to an earlier call was lost
            return
        if step != meeting.step or kind not in ("gather", "sum") or meeting.kind not in (None, kind):
            self._end(f"Silo {silo!r} is at another step than the others. Start all with the same questions.")
            raise Refused(410, self.ended[name])
        if kind == "sum":
            _summand(silo, data)
        if not meeting.messages:
            meeting.until = now + self.seconds
        meeting.kind = "sum" if kind == "sum" else "gather"
        meeting.messages[silo] = data
        if len(meeting.messages) == len(self.silos):
            self._finish_step(meeting, now)

    def get(self, silo: str, name: str, step: int) -> bytes | None:
        """What a step has become; None while others are waited for.

        Raises:
            Refused: 410 if the meeting is over or the step too long ago.
        """
        meeting = self._of(name)
        if step == meeting.step - 1:
            return meeting.outcome
        if step != meeting.step:
            raise Refused(410, f"Step {step} of the meeting is gone.")
        return None

    def leave(self, silo: str, token: object, reason: object, now: float) -> None:
        """A silo leaves.

        Args:
            silo: The silo.
            token: What it has come with.
            reason: Why it leaves early; empty if it has all answers.
            now: The time.
        """
        meeting = self.meeting
        if meeting is None or meeting.tokens.get(silo) != token:
            return
        if not meeting.has_begun:
            del meeting.tokens[silo], meeting.seen[silo]
        elif reason:
            self._end(f"Silo {silo!r}: {str(reason)[:500]}")
        else:
            meeting.left.add(silo)
            if len(meeting.left) == len(self.silos):
                self.audit.append("meeting over", steps=meeting.step)
                self.meeting = None

    def step(self, now: float) -> None:
        """Does what is due."""
        meeting = self.meeting
        if meeting is None:
            return
        if not meeting.has_begun:
            for silo in [silo for silo, seen in meeting.seen.items() if now - seen > SILENT_S]:
                meeting.tokens.pop(silo, None)
                del meeting.seen[silo]
        elif now >= meeting.until:
            lost = sorted(set(self.silos) - meeting.messages.keys() - meeting.left)
            self._end(f"No answer of {', '.join(lost)} within {self.seconds:g} s. Ask again.")

    def _of(self, name: str) -> Meeting:
        if self.meeting is None or not self.meeting.has_begun or self.meeting.name != name:
            raise Refused(410, self.ended.get(name, "There is no such meeting: the coordinator has started again."))
        return self.meeting

    def _finish_step(self, meeting: Meeting, now: float) -> None:
        messages = [meeting.messages[silo] for silo in self.silos]
        if meeting.kind == "sum":
            tensors = [_summand(silo, data) for silo, data in zip(self.silos, messages, strict=True)]
            first = tensors[0]
            for silo, own in zip(self.silos, tensors, strict=True):
                if own.shape != first.shape or own.dtype != first.dtype:
                    self._end(f"Silo {silo!r} adds other numbers than {self.silos[0]!r}. Ask all the same.")
                    raise Refused(410, self.ended[meeting.name])
            total = torch.zeros_like(first)
            for own in tensors:  # in the order of their names
                total += own
            meeting.outcome = Message({}, {SUM: total}).encode()
        else:
            meeting.outcome = b"".join(len(data).to_bytes(8, "little") + data for data in messages)
        meeting.step, meeting.kind, meeting.messages, meeting.until = meeting.step + 1, None, {}, now + self.seconds

    def _end(self, reason: str) -> None:
        meeting, self.meeting = self.meeting, None
        assert meeting is not None
        for name in (meeting.name, *meeting.tokens.values()):
            self.ended[name] = reason
        while len(self.ended) > MAX_ENDED:
            del self.ended[next(iter(self.ended))]
        self.audit.append("meeting ended", reason=reason, steps=meeting.step)


def _summand(silo: str, data: bytes) -> torch.Tensor:
    try:
        message = Message.decode(data)
        (own,) = message.tensors.values()
        if own.dtype not in (torch.float32, torch.float64, torch.int32, torch.int64) or list(message.tensors) != [SUM]:
            raise ValueError(f"it adds {own.dtype}")
    except ValueError as error:
        raise Refused(422, f"What silo {silo!r} adds is refused: {error}") from error
    if finite_error(message.tensors):
        raise Refused(422, f"What silo {silo!r} adds holds NaN or Inf.")
    return own


def split_messages(data: bytes, count: int) -> list[bytes]:
    """The messages that were joined into one.

    Raises:
        ValueError: If there are not as many.
    """
    found, place = [], 0
    for _ in range(count):
        size = int.from_bytes(data[place : place + 8], "little")
        found.append(data[place + 8 : place + 8 + size])
        place += 8 + size
    if place != len(data):
        raise ValueError(f"The coordinator sent {len(data)} bytes that are not {count} messages.")
    return found


def digest(data: bytes) -> str:
    """SHA-256 of a message, for the audit log."""
    return hashlib.sha256(data).hexdigest()
