"""Restores a module's state outside its ``state_dict`` before each client, so that no client sees another's."""

from __future__ import annotations

import io
import operator
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_fl.engines.module_state import GENERATORS, Snapshot, capture
from lightning_fl.seeding import derive_seed

DATA_AND_HANDLES = (DataLoader, Dataset, threading.Thread, io.IOBase)
"""Types of objects that are not part of what a client trains."""


class Isolation:
    """Restores, before each client, the state of a module that training has changed besides the tensors engines load.

    That is: attributes of the module, of its submodules and of the objects that they hold, down to the elements of
    containers; buffers that are not in the ``state_dict``; other tensors, arrays and random generators. What clients
    have appended to a list is hidden from the other clients and reappears at the end of the round, because many modules
    collect outputs or losses that way.

    Args:
        module: The user's module.
        outside: Types of objects that are left alone, with everything that only they refer to.
        ignored: Returns the names of an object's attributes that are left alone.
    """

    def __init__(
        self,
        module: nn.Module,
        outside: tuple[type, ...] = (),
        ignored: Callable[[Any], Collection[str]] = lambda owner: (),
    ) -> None:
        self.module = module
        self.ignored = ignored
        self.outside = (*outside, *DATA_AND_HANDLES)
        self.changed: set[str] = set()
        """Paths of the state restored in the current round, without random generators, which are seeded."""
        self._snapshot = Snapshot()
        self._managed: list[Tensor] = []
        self._known: list[Any] = []
        self._is_captured = False
        self._lists: dict[int, _Collected] = {}

    def begin_round(self) -> None:
        """Hides the items that clients of earlier rounds have added to lists."""
        self.changed = set()
        self._is_captured = False
        for collected in self._lists.values():
            collected.hide()

    def start_client(self, managed: Iterable[Tensor], known: Iterable[Any]) -> None:
        """Restores the state at which the first client of the round started.

        Args:
            managed: Tensors that the engine loads itself.
            known: Objects that the engine handles itself, such as optimizers.

        Raises:
            ValueError: If the module holds an iterator that can't be copied.
        """
        if self._is_captured:
            self.put_back()
            return
        # At the first client, not at the round's start: callbacks may change the module when a round has begun.
        self._is_captured, before = True, self._managed
        self._managed, self._known = list(managed), list(known)
        self._capture(is_stale=[*map(id, before)] != [*map(id, self._managed)])

    def _capture(self, is_stale: bool = False) -> None:
        if self._snapshot.parts and not is_stale and not self._snapshot.has_changed():
            return
        self._snapshot = capture(self.module, self._managed, self._known, self.outside, self.ignored, reads_code=False)
        for path, kind in self._snapshot.iterators.items():
            raise ValueError(
                f"The module holds a {kind} in {path!r}, which can't be rewound, so each client would continue where "
                "another one stopped. Keep a list and an index instead."
            )
        reached = {id(part.owner) for part in self._snapshot.parts}
        self._lists = {key: collected for key, collected in self._lists.items() if key in reached}

    def put_back(self) -> None:
        """Restores the state, and saves the items added to lists for the round's end."""
        if self._is_captured and self._snapshot.has_changed():
            self._restore()

    def _restore(self) -> None:
        for part in self._snapshot.changed():
            self._collect(part)
            part.restore()

    def _collect(self, part: Any) -> None:
        """Saves what clients have added to a list, or notes that something else must be restored."""
        # A deque with a maximum length is a queue.
        is_list = isinstance(part.owner, list | deque) and getattr(part.owner, "maxlen", None) is None
        if is_list and _starts_with(part.owner, part.saved):
            collected = self._lists.setdefault(id(part.owner), _Collected(part.owner, part.saved))
            collected.full += list(part.owner)[len(part.saved) :]
        elif not isinstance(part.owner, GENERATORS):
            # The engine restores managed tensors even where a module has assigned another tensor in their place.
            managed = set(map(id, self._managed))
            self.changed.update(path for path, before in part.changes().items() if id(before) not in managed)

    def end_round(self) -> None:
        """Restores the state, and puts the items that clients added back into the lists."""
        self.put_back()
        self._is_captured = False
        for collected in self._lists.values():
            collected.show()

    @contextmanager
    def after_round(self) -> Iterator[None]:
        """A block for the hooks of the round's last batch, which run after the round's end: undoes their changes.

        They see a client's batch, and clients on other ranks must not be able to tell whose.
        """
        if not self._snapshot.parts:  # no client has trained here
            yield
            return
        self._capture()
        yield
        self._restore()
        for collected in self._lists.values():
            collected.show()

    def seed(self, seed: int) -> None:
        """Seeds the module's own random generators for a client; otherwise all clients would draw the same numbers."""
        for index, generator in enumerate(self._snapshot.generators):
            own = derive_seed(seed, index)
            if isinstance(generator, torch.Generator):
                generator.manual_seed(own)
            elif isinstance(generator, np.random.BitGenerator):
                generator.state = type(generator)(own).state
            else:  # NumPy's older generator accepts 32 bits
                generator.seed(own % 2**32)


class _Collected:
    """A list to which clients add.

    Args:
        owner: The list.
        start: What it held when the round started.
    """

    def __init__(self, owner: list[Any] | deque[Any], start: Sequence[Any]) -> None:
        self.owner = owner
        self.start = list(start)
        self.full = list(start)

    def hide(self) -> None:
        """Removes the clients' items from the list."""
        now = list(self.owner)
        # Items that the user has put in place of the clients' items between rounds stay.
        is_kept = _starts_with(now, self.full)
        self.start = [*self.start, *now[len(self.full) :]] if is_kept else now
        self.full = now
        _fill(self.owner, self.start)

    def show(self) -> None:
        """Puts the clients' items into the list."""
        _fill(self.owner, self.full)


def _starts_with(now: Sequence[Any], before: Sequence[Any]) -> bool:
    return len(now) >= len(before) and all(map(operator.is_, now, before))


def _fill(owner: list[Any] | deque[Any], items: Sequence[Any]) -> None:
    if len(owner) != len(items) or not _starts_with(owner, items):
        owner.clear()
        owner.extend(items)
