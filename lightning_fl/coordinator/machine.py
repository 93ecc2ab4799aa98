"""The rounds as a pure state machine: no files, no sockets, and the time is passed in.

::

    gathering --open--> training --begin_close--> closing --closed--> gathering ... --> over

- Gathering: silos ask for the round. It opens when all expected silos have asked, or ``gather_s`` after the first.
- Training: the cohort's updates arrive. A silo that asks late joins while there is time. The round closes when the
  whole cohort has sent its updates, or at the deadline with at least ``min_silos`` updates; with fewer it waits.
- Closing: the updates are being aggregated; nothing more is accepted.

A silent silo is excluded only by the round's deadline, or by saying that it leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Literal

Phase = Literal["gathering", "training", "closing", "over"]
Step = Literal["open", "close"]
GRACE = 60.0
"""Seconds after its last piece for which a transfer keeps a round open, up to ``max_deadline_s``."""


@dataclass(frozen=True)
class Rules:
    """When rounds open and close. All times are in seconds.

    Args:
        silos: The names of all silos that may take part.
        rounds: Number of rounds.
        min_silos: Minimum number of updates with which a round closes.
        gather_s: How long a round waits to open for silos that have not asked, once one has.
        deadline_s: How long a round waits for updates.
        max_deadline_s: How long it waits at most for transfers in progress.
        evaluation_s: How long the exchange of evaluations waits after the first one.
    """

    silos: tuple[str, ...]
    rounds: int
    min_silos: int = 1
    gather_s: float = 30.0
    deadline_s: float = 3600.0
    max_deadline_s: float = 7200.0
    evaluation_s: float = 600.0

    def __post_init__(self) -> None:
        checks = {
            "silos": len(self.silos) >= 1 and len(set(self.silos)) == len(self.silos),
            "rounds": self.rounds >= 1,
            "min_silos": 1 <= self.min_silos <= len(self.silos),
            "gather_s": self.gather_s >= 0,
            "deadline_s": self.deadline_s > 0,
            "max_deadline_s": self.max_deadline_s >= self.deadline_s,
            "evaluation_s": self.evaluation_s > 0,
        }
        for name, holds in checks.items():
            if not holds:
                raise ValueError(
                    f"federation.yaml has {name}={getattr(self, name)!r}; expected at least one silo, no name twice, "
                    "rounds >= 1, 1 <= min_silos <= number of silos, times > 0, max_deadline_s >= deadline_s."
                )


@dataclass
class RoundMachine:
    """The state of a federation's rounds.

    Args:
        rules: When rounds open and close.
        fewest: Minimum number of updates for a round with this many silos, if it is more than ``min_silos``.
        takes_late: Whether a silo that asks late joins the open round.
        round: The round that is open or will open next.
        phase: The round's phase.
        cohort: The silos of the open round.
        done: The silos whose update was accepted, each with its digest.
        refused: The silos whose update was refused, each with the reason.
        expected: The silos for which the next round waits to open.
        left: The silos that have left.
        asked: The silos that are ready for the next round.
        sending: The silos whose update is being uploaded, each with the time of its last piece.
        gather_until: When the next round opens without those that have not asked.
        deadline: When the open round closes, unless a transfer is in progress.
        max_deadline: When it closes even then.
    """

    rules: Rules
    fewest: Callable[[int], int] = field(default=lambda cohort_size: 1, kw_only=True)
    takes_late: bool = field(default=True, kw_only=True)
    round: int = 0
    phase: Phase = "gathering"
    cohort: set[str] = field(default_factory=set)
    done: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    expected: set[str] = field(default_factory=set)
    left: set[str] = field(default_factory=set)
    asked: set[str] = field(default_factory=set)
    sending: dict[str, float] = field(default_factory=dict)
    gather_until: float = 0.0
    deadline: float = 0.0
    max_deadline: float = 0.0

    def __post_init__(self) -> None:
        self.expected = self.expected or set(self.rules.silos)
        if self.round >= self.rules.rounds:
            self.phase = "over"

    # ---- events from silos

    def join(self, silo: str) -> None:
        """Handles a silo that has joined or come back: the next round waits for it."""
        self.left.discard(silo)
        self.expected.add(silo)

    def leave(self, silo: str) -> None:
        """Handles a silo that leaves: nothing waits for it any more. Its accepted update still counts."""
        self.left.add(silo)
        self.sending.pop(silo, None)
        self.expected.discard(silo)
        self.asked.discard(silo)

    def ask(self, silo: str, now: float) -> bool:
        """Notes that a silo is ready for the next round; returns whether it has thereby joined the open round."""
        self.join(silo)
        if self.phase == "gathering":
            if not self.asked:
                self.gather_until = now + self.rules.gather_s
            self.asked.add(silo)
        elif self.phase == "training" and silo not in self.cohort and self.takes_late:
            if now >= self.closes_at:  # the round waits for more updates: the one that comes now gets its full time
                self._set_deadline(now)
            self.cohort.add(silo)
            return True
        return False

    def progress(self, silo: str, now: float) -> None:
        """Notes that a piece of a silo's update has arrived."""
        if self.phase == "training" and silo in self.cohort:
            self.sending[silo] = now

    def takes(self, silo: str, round: int) -> bool:
        """Whether an update of a silo for a round may still arrive."""
        return self.phase == "training" and round == self.round and silo in self.cohort

    def accept(self, silo: str, digest: str) -> None:
        """Notes that a silo's update is complete and valid."""
        self.done[silo] = digest
        self.refused.pop(silo, None)
        self.sending.pop(silo, None)

    def refuse(self, silo: str, reason: str) -> None:
        """Notes that a silo's update is invalid: the round does not wait for another one, but accepts it."""
        self.sending.pop(silo, None)
        if silo not in self.done:
            self.refused[silo] = reason

    # ---- time

    def due(self, now: float) -> Step | None:
        """The step that is due: to open the round, or to close it."""
        if self.phase == "gathering":
            is_full = self.expected <= self.asked or now >= self.gather_until
            return "open" if is_full and not self.lacks else None
        if self.phase == "training":
            waits = self.cohort - self.left - self.refused.keys() - self.done.keys()
            is_full = not waits or now >= self.closes_at
            return "close" if is_full and not self.lacks else None
        return None

    @property
    def closes_at(self) -> float:
        """The deadline, extended by transfers in progress."""
        goes_on = max(self.sending.values(), default=0.0) + GRACE
        return max(self.deadline, min(goes_on, self.max_deadline)) if self.sending else self.deadline

    @property
    def lacks(self) -> int:
        """Number of silos that the next step still needs."""
        if self.phase not in ("gathering", "training"):
            return 0
        have, silos = (self.asked, self.asked) if self.phase == "gathering" else (self.done, self.cohort)
        return max(0, max(self.rules.min_silos, self.fewest(len(silos))) - len(have))

    def open(self, now: float) -> None:
        """Opens the round with the silos that have asked."""
        self.expected = set(self.asked)
        self.resume(self.asked, {}, now)

    def resume(self, cohort: Iterable[str], done: dict[str, str], now: float, age: float = 0.0) -> None:
        """Opens a round, or opens it again after a restart; the deadline is restarted.

        Args:
            cohort: Its silos.
            done: The silos whose update was accepted, each with its digest.
            now: The current time, in seconds.
            age: Seconds for which it has been open already: restarts do not extend ``max_deadline_s``.
        """
        self.phase, self.cohort, self.asked = "training", set(cohort), set()
        self.done, self.refused, self.sending = dict(done), {}, {}
        self._set_deadline(now, age)

    def reopen(self) -> None:
        """Abandons the open round, so that it opens again with the silos that ask for it."""
        self.phase = "gathering"
        self.cohort, self.done, self.refused, self.asked, self.sending = set(), {}, {}, set(), {}

    def begin_close(self) -> None:
        """Accepts nothing more."""
        self.phase = "closing"

    def closed(self, is_last: bool = False) -> None:
        """Notes that the round has become part of the model: the next one may open.

        Args:
            is_last: Whether it was the last, whatever the number of rounds.
        """
        # Silos that have not delivered may be gone: the next round waits for those that have, and for new ones.
        came = self.expected - self.cohort
        self.expected = (self.done.keys() | came) - self.left or set(self.rules.silos)
        self.round += 1
        self.phase = "over" if is_last or self.round >= self.rules.rounds else "gathering"
        self.cohort, self.done, self.refused, self.asked = set(), {}, {}, set()

    def lost(self, members: Collection[str]) -> list[str]:
        """The cohort's silos without an update in the round.

        Args:
            members: The silos whose update is in it.
        """
        return sorted(self.cohort - set(members) - self.refused.keys())

    def _set_deadline(self, now: float, age: float = 0.0) -> None:
        self.max_deadline = now + max(0.0, self.rules.max_deadline_s - age)
        self.deadline = min(now + self.rules.deadline_s, self.max_deadline)


@dataclass
class Exchange:
    """Messages about one topic after a round, such as evaluations: it ends when all have arrived, or after a time.

    Args:
        expected: The silos that are waited for.
        seconds: How long it waits after the first message.
        done: The silos whose message has arrived, each with its digest.
    """

    expected: set[str]
    seconds: float
    done: dict[str, str] = field(default_factory=dict)
    until: float | None = None
    is_over: bool = False

    def accept(self, silo: str, digest: str, now: float) -> None:
        """Notes that a silo's message has arrived."""
        self.done[silo] = digest
        self.until = now + self.seconds if self.until is None else self.until

    def due(self, now: float, left: set[str]) -> bool:
        """Whether it should end now."""
        in_time = self.until is not None and now >= self.until
        return not self.is_over and bool(self.done) and (self.expected - left <= self.done.keys() or in_time)
