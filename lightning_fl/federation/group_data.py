"""The batches of clients that train side by side: read before they train, stacked step by step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

from lightning_fl.clients.local_work import BatchPosition
from lightning_fl.data.client_loaders import Loader
from lightning_fl.engines.vectorized.grouping import Grouping, batch_signature
from lightning_fl.engines.vectorized.stacking import StackedBatch
from lightning_fl.engines.vectorized.step_schedule import StepMask
from lightning_fl.federation.client_batches import ClientBatches, LoaderFailed
from lightning_fl.types import ClientId


class GroupSplit(Exception):
    """Raised when the clients of a planned group can't train together, or would be slower than apart.

    Args:
        parts: The groups in which they train instead.
    """

    def __init__(self, parts: Sequence[Sequence[ClientId]]) -> None:
        super().__init__(f"trains as {len(parts)} groups")
        self.parts = [tuple(part) for part in parts]


@dataclass(frozen=True)
class StackedData:
    """The batches of a client group.

    Args:
        grouping: Stacks the batches.
        passes: Each client's batches of the round.
        positions: The positions of one client's batches, for groups in which all clients have equal work.
        sizes: Number of examples in one pass over each client's data.
    """

    grouping: Grouping
    passes: Mapping[ClientId, Sequence[Any]]
    positions: Sequence[BatchPosition]
    sizes: Sequence[int | None]

    @property
    def clients(self) -> Sequence[ClientId]:
        return tuple(self.passes)

    @property
    def loader(self) -> Loader | None:
        return None  # the clients' data has been read

    @cached_property
    def works(self) -> dict[ClientId, tuple[Any, ...]]:
        """For each client, the signatures of its batches: batches of equal signature can be stacked."""
        return {client: tuple(map(batch_signature, batches)) for client, batches in self.passes.items()}

    @cached_property
    def masks(self) -> list[StepMask] | None:
        """Who trains in each step; None if all clients train in each."""
        return self.grouping.masks(list(self.works.values()))

    def read(self, next_phase: Callable[[], None]) -> Iterator[tuple[StackedBatch, BatchPosition]]:
        # `first` has been taken off the iterator, to try a step of the group before it is trained.
        masks, batches = self.masks, chain([self.first], self._batches)
        if masks is None:
            return zip(batches, self.positions, strict=True)
        last = len(masks) - 1  # each step is a window of its own: accumulation needs equal work
        ends = (step == last for step in range(len(masks)))
        positions = (
            BatchPosition(step, ends_phase=is_last, is_last=is_last, ends_epoch=is_last, epoch_length=len(masks))
            for step, is_last in enumerate(ends)
        )
        return zip(batches, positions, strict=True)

    @cached_property
    def first(self) -> StackedBatch:
        """The first stacked batch.

        Raises:
            NotStackable: If the batches hold something that can't be stacked.
        """
        return next(self._batches)

    @cached_property
    def _batches(self) -> Iterator[StackedBatch]:
        batches, replays = self.grouping.stacked(list(self.passes.values()), self.masks), self.grouping.engine.replays
        return batches if replays is None else replays.read_ahead(batches)

    def read_once(self) -> Iterator[Any]:
        raise AssertionError("an algorithm with a probe trains its clients alone")


def read_group(
    grouping: Grouping,
    clients: Sequence[ClientId],
    open_client: Callable[[ClientId], ClientBatches],
    num_batches: Callable[[ClientId], int],
    sizes: Mapping[ClientId, int | None],
    on_failure: Callable[[LoaderFailed], None],
) -> StackedData:
    """Reads the batches of a group.

    Args:
        grouping: Decides who may train together.
        clients: The clients of the group.
        open_client: Opens a client's batches, to be read with the client's random numbers.
        num_batches: Returns the number of batches that a client has in the round.
        sizes: Number of examples in one pass over each client's data.
        on_failure: Called when a client's loader raises; reading continues with the next client.

    Raises:
        GroupSplit: If the batches are not what the planner expected.
    """
    passes: dict[ClientId, list[Any]] = {}
    positions: dict[ClientId, list[BatchPosition]] = {}
    for client in clients:
        try:
            batches = open_client(client)
            pairs = list(batches.read())
        except LoaderFailed as failed:
            on_failure(failed)
            continue
        passes[client] = [batch for batch, _ in pairs]
        positions[client] = [position for _, position in pairs]
        if len(passes) > 1:
            continue
        # Only a batch that has been read shows how much memory batches take, and reading all of them first would
        # already take it.
        if pairs:
            parts = grouping.affordable(clients, passes[client], map(num_batches, clients))
            if len(parts) > 1:
                raise GroupSplit(parts)
    # The positions of the first client serve the whole group if all have equal work; with unequal work `read` makes
    # positions of its own.
    data = StackedData(grouping, passes, next(iter(positions.values()), []), [sizes[client] for client in passes])
    parts = grouping.split(data.works)
    if parts == [list(clients)] and data.masks is None:
        # One pass over six batches and two over three are the same batches, but not for who looks at `batch_idx`.
        alike: dict[Any, list[ClientId]] = {}
        for client in clients:
            alike.setdefault(tuple(positions[client]), []).append(client)
        parts = list(alike.values())
    # This also differs if a client's loader has failed: the remaining ones are then planned as a group of their own.
    if parts != [list(clients)]:
        if len(parts) > 1:
            grouping.remember(data.works, parts)
        raise GroupSplit(parts)
    return data
