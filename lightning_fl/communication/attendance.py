"""Tracks which ranks have joined a federation, which ones are waited for, and why ranks left."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist

NAME_VARIABLE = "LIGHTNING_FL_SILO_NAME"
FIRST_NOTICE, LONGEST_NOTICE = 3.0, 600.0
"""Seconds of waiting before the missing ranks are logged; doubled each time, so that the log does not fill up."""
GRACE = 2.0
"""Seconds that a failing rank waits for the others to read its failure."""
MAX_SENTENCE = 500
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")

log = logging.getLogger("lightning_fl.communication")


def check_silo_name(name: str) -> str:
    """Returns the name if it is suitable for folders and logs; the rule is that of a coordinator's certificates.

    Raises:
        ValueError: If it is not.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"silo_name={name!r} may hold up to 63 lower-case letters, digits and inner hyphens.")
    return name


class Attendance:
    """Notes that the ranks of a federation leave for each other in their store, besides the collectives.

    The store is read only while a rank waits, so that rounds without waiting cost nothing.

    Args:
        store: The rendezvous store of the ranks.
        rank: Index of this process, from 0.
        size: Number of processes.
    """

    def __init__(self, store: dist.Store, rank: int, size: int) -> None:
        self.store, self.rank, self.size = store, rank, size
        self.names: list[str] = [""] * size
        self.has_failed = False
        self._patience = FIRST_NOTICE
        # One line per machine, because its ranks write to the same terminal.
        self._speaks = os.environ.get("LOCAL_RANK", "0") == "0"

    def arrive(self, name: str, timeout: timedelta) -> None:
        """Announces this rank to the others and waits for them; logs the missing ones.

        Args:
            name: The silo's name; empty if it has none.
            timeout: Maximum time to wait.

        Raises:
            TimeoutError: If some ranks have not joined in time.
            ValueError: On every rank, if some have a name and others have none, or two have the same.
        """
        self.store.set(f"here/{self.rank}", name)
        start = said = time.monotonic()
        while absent := self._absent("here", 0):
            now = time.monotonic()
            here = ", ".join(self.who(rank) for rank in range(self.size) if rank not in absent)
            if now - start > timeout.total_seconds():
                raise TimeoutError(
                    f"{self._missing(absent)} after {timeout.total_seconds():g} s; {here} joined. Start all ranks with "
                    "the same MASTER_ADDR, MASTER_PORT and WORLD_SIZE."
                )
            if now - said > self._patience:
                said = now
                self._tell(f"Waiting for others to join the federation: {self._missing(absent)}; here: {here}.")
            time.sleep(0.02 if now - start < 1 else 0.25)
        self._patience = FIRST_NOTICE
        self._absent("here", 0)  # reads the names
        _check_names(self.names)

    def who(self, rank: int) -> str:
        """The rank's display name, with the name of its silo if it has one."""
        return f"silo {self.names[rank]}" if self.names[rank] else f"rank {rank}"

    @property
    def patience(self) -> timedelta:
        """Time to wait before the next notice."""
        return timedelta(seconds=self._patience)

    def notice(self, number: int) -> None:
        """Logs which ranks this one waits for in the collective ``number``; other waiting ranks have left a note."""
        self.store.set(f"waits/{self.rank}", str(number))
        late = self._absent("waits", number)
        # Ranks of a simulation on one machine wait for each other all the time; that needs no log.
        if late and (any(self.names) or int(os.environ.get("LOCAL_WORLD_SIZE", 1)) < self.size):
            self._tell(f"Waiting for {self._missing(late)}.")

    def note_failure(self, sentence: str) -> None:
        """Leaves a note for the others why this rank leaves."""
        self.has_failed = True
        self.store.set(f"failed/{self.rank}", sentence[:MAX_SENTENCE])

    def explain_loss(self, number: int) -> str:
        """Which rank has left: one that left a note, or one that did not report the failure in time.

        Args:
            number: Number of the collective that failed.
        """
        try:
            self.store.set(f"seen/{self.rank}", str(number))
            end = time.monotonic() + GRACE
            while (absent := self._absent("seen", number)) and time.monotonic() < end:
                if words := self._failures():
                    return words
                time.sleep(0.05)
            if words := self._failures():
                return words
        except RuntimeError:  # rank 0 hosts the store, unless torchrun does
            absent = [0] if self.rank else []
        if not absent:
            return "Another rank has left the federation"
        return f"{' or '.join(map(self.who, absent)).capitalize()} has left the federation"

    def wait_until_seen(self) -> None:
        """Keeps this process, and with it the store, alive until the others have read why it leaves."""
        end = time.monotonic() + GRACE
        try:
            while self._absent("seen", 0) and time.monotonic() < end:
                time.sleep(0.05)
        except RuntimeError:
            return

    def _failures(self) -> str:
        failed = [rank for rank in range(self.size) if self.store.check([f"failed/{rank}"])]
        return "; ".join(f"{self.who(rank).capitalize()} has failed: {self._words_of(rank)}" for rank in failed)

    def _words_of(self, rank: int) -> str:
        # Another organisation wrote it: it must not contain control characters or line breaks.
        words = self.store.get(f"failed/{rank}").decode(errors="replace")[:MAX_SENTENCE]
        return "".join(letter if letter.isprintable() else " " for letter in words)

    def _absent(self, what: str, number: int) -> list[int]:
        """The ranks without a note, or with one for an earlier collective only; also reads the names of the others."""
        absent = []
        for rank in range(self.size):
            key = f"{what}/{rank}"
            if not self.store.check([key]):
                absent.append(rank)
            elif what == "here":
                name = self.store.get(key).decode(errors="replace")
                self.names[rank] = check_silo_name(name) if name else ""
            elif int(self.store.get(key)) < number:
                absent.append(rank)
        return [rank for rank in absent if rank != self.rank]

    def _missing(self, absent: Sequence[int]) -> str:
        return f"{', '.join(map(self.who, absent))}, {len(absent)} of {self.size} missing"

    def _tell(self, sentence: str) -> None:
        self._patience = min(2 * self._patience, LONGEST_NOTICE)
        if self._speaks:
            log.warning(sentence)


def _check_names(names: Sequence[str]) -> None:
    without = [rank for rank, name in enumerate(names) if not name]
    if 0 < len(without) < len(names):
        known = ", ".join(name for name in names if name)
        raise ValueError(
            f"{known} have a silo_name, but rank {', '.join(map(str, without))} has none. Give one to every silo, with "
            f"FederatedStrategy(silo_name=...) or the variable {NAME_VARIABLE}, or to none."
        )
    for rank, name in enumerate(names):
        if name and names.index(name) < rank:
            raise ValueError(f"Ranks {names.index(name)} and {rank} are both called {name!r}; silo names are unique.")
