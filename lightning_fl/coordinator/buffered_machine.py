"""The life of rounds that nobody waits for, as a pure state machine."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from lightning_fl.coordinator.machine import RoundMachine, Step


@dataclass
class BufferedMachine(RoundMachine):
    """A round closes when ``size`` updates have come, whatever the model from which each silo has started.

    Only the first round gathers. After it a silo that asks starts at once, from the newest model. When its update has
    come it waits for the model that holds it, so a round has one update of a silo at most. With fewer than ``size``
    updates a round closes at its deadline, or when nobody is left who could send another.

    Args:
        size: Updates with which a round closes.
        max_staleness: By how many rounds an update may be older than the round that takes it in. None: any.
        versions: For each silo that trains, or whose update the open round has, the round with whose model it started.
        too_stale: The silos whose update was too old for the open round.
    """

    size: int = field(default=1, kw_only=True)
    max_staleness: int | None = field(default=None, kw_only=True)
    versions: dict[str, int] = field(default_factory=dict, kw_only=True)
    too_stale: list[str] = field(default_factory=list, kw_only=True)

    def ask(self, silo: str, now: float) -> bool:
        """A silo is ready; returns whether it starts from a model from which it has not started before."""
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
        """Whether updates have to wait until the next round is open."""
        return self.phase in ("gathering", "closing") or (self.phase == "training" and len(self.done) >= self.size)

    def is_too_stale(self, silo: str) -> bool:
        """Whether the update of a silo that trains is too old for the open round."""
        return self.max_staleness is not None and self.round - self.versions[silo] > self.max_staleness

    def drop(self, silo: str) -> None:
        """A silo's update is too old: it starts again from the newest model."""
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
        if len(self.done) < self.size:  # who had not come by the deadline is waited for again once it comes
            self.expected &= self.done.keys()
        for silo in self.done:
            del self.versions[silo]
        self.round += 1
        self.phase = "over" if is_last or self.round >= self.rules.rounds else "gathering"
        self.cohort, self.done, self.refused, self.asked = set(self.versions), {}, {}, set()
        self.too_stale = []  # here and not in `resume`: one may be refused before the next round is open

    def lost(self, members: Collection[str]) -> list[str]:
        """Nobody: who has not come trains on, for a later round."""
        return []

    def _forget(self, silo: str) -> None:
        self.versions.pop(silo, None)
        self.cohort.discard(silo)
