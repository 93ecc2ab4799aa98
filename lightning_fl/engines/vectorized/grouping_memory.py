"""Findings of earlier rounds that later ones use to decide which clients train together."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lightning_fl.types import ClientId


@dataclass(frozen=True)
class GroupingMemory:
    """What has been found out about training clients together.

    Training together and alone give the same result only up to rounding. A resumed run gives the same bits only if it
    forms the same groups, so this is the same on all ranks when a round starts, and part of the checkpoint.

    Args:
        kinds: For clients that could not train as planned, what their batches look like; only clients of one kind are
            planned together.
        gradients: For each shape of batch in groups of unequal work, which parameters get a gradient; None if the step
            may do something else the next time.
        is_tried: Whether a step of several clients has been found to be worthwhile.
        is_alone: Whether a group has failed, so that all clients train alone.
        max_clients: The largest number of clients whose step has fitted, or is expected to fit, in a GPU's memory; None
            if unknown.
    """

    kinds: Mapping[ClientId, str] = field(default_factory=dict)
    gradients: Mapping[str, str | None] = field(default_factory=dict)
    is_tried: bool = False
    is_alone: bool = False
    max_clients: int | None = None

    def with_(self, other: GroupingMemory) -> GroupingMemory:
        """The union of this and ``other``; ``other`` takes precedence where both have an entry."""
        return GroupingMemory(
            {**self.kinds, **other.kinds},
            {**self.gradients, **other.gradients},
            self.is_tried or other.is_tried,
            self.is_alone or other.is_alone,
            min((own for own in (self.max_clients, other.max_clients) if own is not None), default=None),
        )

    def since(self, before: GroupingMemory) -> GroupingMemory:
        """What this adds to ``before``."""
        return GroupingMemory(
            {client: kind for client, kind in self.kinds.items() if before.kinds.get(client) != kind},
            {shape: names for shape, names in self.gradients.items() if shape not in before.gradients},
            self.is_tried and not before.is_tried,
            self.is_alone and not before.is_alone,
            self.max_clients if self.max_clients != before.max_clients else None,
        )

    def pack(self) -> dict[str, Any]:
        """As lists and plain values, for a checkpoint or a message."""
        return {
            "kinds": [list(pair) for pair in self.kinds.items()],
            "gradients": dict(self.gradients),
            "is_tried": self.is_tried,
            "is_alone": self.is_alone,
            "max_clients": self.max_clients,
        }

    @classmethod
    def unpack(cls, packed: Mapping[str, Any]) -> GroupingMemory:
        """Reads what :meth:`pack` has packed."""
        return cls(**{**packed, "kinds": dict(packed.get("kinds", ()))})


def joined_memory(memory: GroupingMemory, news: Iterable[Mapping[str, Any]]) -> GroupingMemory:
    """The memory after a round.

    Args:
        memory: The memory before the round.
        news: The findings of each rank, packed.
    """
    for packed in news:
        memory = memory.with_(GroupingMemory.unpack(packed))
    return memory


def digest(values: Collection[Any]) -> str:
    """A short name for a set of values, the same in every process."""
    return hashlib.blake2b("\n".join(sorted(map(repr, values))).encode(), digest_size=8).hexdigest()
