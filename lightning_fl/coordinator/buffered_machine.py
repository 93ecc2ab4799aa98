"""Asynchronous rounds as a pure state machine."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from lightning_fl.coordinator.machine import RoundMachine, Step


@dataclass
class BufferedMachine(RoundMachine):
    """A round closes when ``size`` updates have arrived, whatever the model from which each silo started.

    Only the first round waits for silos to gather. After it, a silo that asks starts at once, from the newest model.
    Once its update has been accepted, it waits for the model that contains it, so a round has at most one update of
    each silo. With fewer than ``size`` updates a round closes at its deadline, or when no silo is left that could send
    another.

    Args:
        size: Number of updates with which a round closes.
        max_staleness: Maximum staleness of an update, in rounds. None: no limit.
        versions: For each silo that trains, or whose update is in the open round, the round of the model from which it
            started.
        too_stale: The silos whose update was too stale for the open round.
    """

    size: int = field(default=1, kw_only=True)
    max_staleness: int | None = field(default=None, kw_only=True)
    versions: dict[str, int] = field(default_factory=dict, kw_only=True)
    too_stale: list[str] = field(default_factory=list, kw_only=True)

    def ask(self, silo: str, now: float) -> bool:
        """Notes that a silo is ready; returns whether it starts from a model from which it has not started before."""
        if self.phase == "gathering" and self.round == 0:
            return super().ask(silo, now)
        self.join(silo)
        if self.phase != "training" or silo in self.done or self.versions.get(silo) == self.round:
            return False
        self.versions[silo] = self.round
        self.cohort.add(silo)
        return True

    def leave(self, silo: str) -> None:
        super().leave(silo)
        if silo not in self.done:
            self._forget(silo)

    def takes(self, silo: str, round: int) -> bool:
        """Whether a silo may send an update that started from the model of a round."""
        return self.phase != "over" and self.versions.get(silo) == round and silo not in self.done

    @property
    def is_busy(self) -> bool:
        """Whether updates must wait until the next round is open."""
        return self.phase in ("gathering", "closing") or (self.phase == "training" and len(self.done) >= self.size)

    def is_too_stale(self, silo: str) -> bool:
        """Whether the update of a training silo is too stale for the open round."""
        return self.max_staleness is not None and self.round - self.versions[silo] > self.max_staleness

    def drop(self, silo: str) -> None:
        """Drops a silo's update that is too stale: the silo starts again from the newest model."""
        self.too_stale.append(silo)
        self.sending.pop(silo, None)
        self._forget(silo)

    def accept(self, silo: str, digest: str) -> None:
        super().accept(silo, digest)
        self.expected.add(silo)

    def due(self, now: float) -> Step | None:
        if self.phase == "gathering" and self.round > 0:
            return "open"
        if self.phase != "training":
            return super().due(now)
        waits = self.expected - self.left - self.refused.keys() - self.done.keys()
        is_full = len(self.done) >= self.size or not waits or now >= self.closes_at
        return "close" if is_full and not self.lacks else None

    def open(self, now: float) -> None:
        if self.round == 0:
            self.expected = set(self.asked)
        self.resume((), {}, now)

    def resume(self, cohort: Iterable[str], done: dict[str, str], now: float, age: float = 0.0) -> None:
        sending = self.sending  # a transfer outlasts the round in which it has begun
        super().resume(self.versions, done, now, age)
        self.sending = sending

    def closed(self, is_last: bool = False) -> None:
        if len(self.done) < self.size:  # silos that missed the deadline are waited for again once they return
            self.expected &= self.done.keys()
        for silo in self.done:
            del self.versions[silo]
        self.round += 1
        self.phase = "over" if is_last or self.round >= self.rules.rounds else "gathering"
        self.cohort, self.done, self.refused, self.asked = set(self.versions), {}, {}, set()
        self.too_stale = []  # here and not in `resume`: one may be refused before the next round is open

    def lost(self, members: Collection[str]) -> list[str]:
        """Nobody: the others continue to train, for a later round."""
        return []

    def _forget(self, silo: str) -> None:
        self.versions.pop(silo, None)
        self.cohort.discard(silo)
