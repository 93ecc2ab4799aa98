"""Decides which clients train together, and stacks their batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_fl.data.lazy_batches import LazyBatch, RowSource, stack_lazy
from lightning_fl.data.rows_on_device import RowsOnDevice
from lightning_fl.engines.device_memory import device_memory
from lightning_fl.engines.vectorized.engine import Vectorized, VectorizedEngine
from lightning_fl.engines.vectorized.forecast import BatchForecast
from lightning_fl.engines.vectorized.grouping_memory import GroupingMemory, digest
from lightning_fl.engines.vectorized.stacking import StackedBatch, signature, stack
from lightning_fl.engines.vectorized.step_schedule import (
    StepMask,
    are_equal,
    group_clients,
    step_masks,
)
from lightning_fl.torch_internals import pytree
from lightning_fl.tree import num_bytes
from lightning_fl.types import ClientId

COMPUTE_BOUND_BYTES = 2**20
"""Parameter bytes above which a single-client step on a CPU counts as compute-bound."""


class Grouping:
    """Groups a rank's clients and stacks the batches of a group.

    Args:
        engine: Trains the groups.
        settings: The engine's settings, such as the number of clients that train together.
        equal_work_only: Returns whether only clients with equal work may train together, because their steps share more
            than a shape, such as an accumulation window or a schedule.
        convert: Converts a stacked batch before it is used, for example to another precision.
    """

    def __init__(
        self,
        engine: VectorizedEngine,
        settings: Vectorized,
        equal_work_only: Callable[[], bool] = lambda: False,
        convert: Callable[[Any], Any] = lambda content: content,
    ) -> None:
        self.engine = engine
        self.settings = settings
        self.equal_work_only = equal_work_only
        self.convert = convert
        self.rows: RowsOnDevice | None = None
        """Data sets in GPU memory; None before the first batch, and on a CPU."""
        self.memory = GroupingMemory()
        """What earlier rounds and this one have found out."""

    @property
    def max_clients(self) -> int:
        """Maximum number of clients that train together."""
        if self.settings.clients_per_step is not None:
            most = self.settings.clients_per_step
        else:
            usual, most = (self.engine.max_clients(self.settings.stacked_bytes, looks) for looks in (False, True))
            if most < usual:  # a resumed run may find more free memory, and must form the same groups
                self.learn(max_clients=most)
        known = self.memory.max_clients
        return most if known is None else min(most, known)

    def group(self, forecasts: Mapping[ClientId, BatchForecast | None]) -> list[list[ClientId]]:
        """Forms groups of clients that may train together.

        Args:
            forecasts: The forecast of each client's batches; None where there is none.
        """
        max_clients, wants_equal, kinds = self.max_clients, self.equal_work_only(), self.memory.kinds
        families: dict[Any, list[ClientId]] = {}
        for client, forecast in forecasts.items():
            # Where steps must be equal, so must the ends of passes: the optimizer steps there even if a window is not
            # full.
            segments = forecast.segments if forecast is not None and wants_equal else None
            family = (None, client) if forecast is None else (forecast.family, segments, kinds.get(client))
            families.setdefault(family, []).append(client)
        groups: list[list[ClientId]] = []
        for clients in families.values():
            works = {client: forecast.work if (forecast := forecasts[client]) else () for client in clients}
            by_work: dict[Any, list[ClientId]] = {}
            for client, work in works.items():
                by_work.setdefault(work, []).append(client)
            rest: list[ClientId] = []
            # Full groups of equal clients need no masks; the clients that remain of each kind are mixed.
            for equal in sorted(by_work.values(), key=lambda equal: -len(works[equal[0]])):
                num_full = len(equal) // max_clients * max_clients
                groups += [equal[start : start + max_clients] for start in range(0, num_full, max_clients)]
                rest += equal[num_full:]
            # The longest come first in `rest`, so that a mixed group holds clients of similar length.
            for start in range(0, len(rest), max_clients):
                chunk = set(rest[start : start + max_clients])
                groups += self.split({client: work for client, work in works.items() if client in chunk})
        return groups

    def split(self, works: Mapping[ClientId, Sequence[Any]]) -> list[list[ClientId]]:
        """Divides clients into the groups that train fastest.

        Args:
            works: For each client, the signatures of its batches.
        """
        clients = list(works)
        on_gpu = self.engine.device.type != "cpu"
        # A GPU that one client does not saturate takes the same time for several.
        compute_bound = 0.0 if on_gpu else min(1.0, self.engine.bytes_of_one / COMPUTE_BOUND_BYTES)
        apart = self.engine.optimizers.num_steps_apart
        groups = group_clients(list(works.values()), apart, self.equal_work_only(), compute_bound, on_gpu)
        return [[clients[place] for place in group] for group in groups]

    def halve(self, clients: Sequence[ClientId]) -> list[list[ClientId]]:
        """Splits a group whose step does not fit in memory; no later group is larger than its parts."""
        size = (len(clients) + 1) // 2
        self.learn(max_clients=size)
        return [list(clients[start : start + size]) for start in range(0, len(clients), size)]

    def remember(self, works: Mapping[ClientId, Sequence[Any]], parts: Sequence[Sequence[ClientId]]) -> None:
        """Notes that clients could not train as planned, so that later rounds do not read their data twice.

        Args:
            works: For each client, the signatures of its batches.
            parts: The groups in which they train instead.
        """
        kinds = {}
        for part in parts:
            for client in part:
                # A client that is split off again has batches that change from round to round.
                is_alone = len(part) == 1 or client in self.memory.kinds
                kinds[client] = digest([client] if is_alone else set(works[client]))
        self.learn(kinds=kinds)

    def learn(self, **facts: Any) -> None:
        """Adds to the memory.

        Args:
            facts: Fields of :class:`GroupingMemory`.
        """
        self.memory = self.memory.with_(GroupingMemory(**facts))

    def masks(self, works: Sequence[Sequence[Any]]) -> list[StepMask] | None:
        """The clients that train in each step of a group; None if all of its clients train in each."""
        return None if are_equal(works) else step_masks(works, self.engine.optimizers.num_steps_apart)

    def num_steps(self, forecasts: Iterable[BatchForecast]) -> int | None:
        """Steps of a group of clients with unequal work; None if all of them train in each step."""
        masks = self.masks([forecast.work for forecast in forecasts])
        return None if masks is None else len(masks)

    def affordable(
        self, clients: Sequence[ClientId], batches: Sequence[Any], lengths: Iterable[int]
    ) -> list[list[ClientId]]:
        """Divides clients into groups whose batches fit in memory at once.

        Args:
            clients: The clients.
            batches: The batches of one of them, at least one.
            lengths: The number of batches of each client.
        """
        per_batch = sum(map(_num_bytes, batches)) / len(batches)
        groups: list[list[ClientId]] = [[]]
        held = 0.0
        for client, length in zip(clients, lengths, strict=True):
            held += length * per_batch
            if groups[-1] and held > self.settings.batch_bytes:
                groups.append([])
                held = length * per_batch
            groups[-1].append(client)
        return groups

    def stacked(self, passes: Sequence[Sequence[Any]], masks: Sequence[StepMask] | None) -> Iterator[StackedBatch]:
        """Yields the stacked batches of clients that :meth:`split` leaves together, each created when it is needed.

        Args:
            passes: Each client's batches.
            masks: Which clients train in each step. None: all.

        Raises:
            NotStackable: If the batches hold something that can't be stacked.
        """
        # Stacked one step at a time: all steps at once would hold the data twice.
        unread = [iter(batches) for batches in passes]
        every = tuple(range(len(passes)))
        for mask in [every] * len(passes[0]) if masks is None else masks:
            yield self.stack([next(unread[place]) for place in mask], mask)

    def stack(self, batches: Sequence[Any], mask: StepMask) -> StackedBatch:
        """One stacked batch of the clients at the positions ``mask``."""
        is_lazy = isinstance(batches[0], LazyBatch)
        # Not shared even if two clients have the same tensor: the step maps over the first dimension of every tensor.
        content = stack_lazy(batches, self._place) if is_lazy else stack(batches, False, self.engine.pool)[0]
        return StackedBatch(self.convert(content), mask)

    def _place(self, source: RowSource) -> RowSource:
        if self.rows is None and self.engine.device.type != "cpu":
            self.rows = RowsOnDevice(self.engine.device, self._max_data_bytes)
        return source if self.rows is None else self.rows.place(source)

    def _max_data_bytes(self) -> int:
        memory, asked = device_memory(self.engine.device), self.settings.data_bytes
        return asked if asked is not None else 0 if memory is None else memory.free // 4

    def close(self) -> None:
        """Frees the data sets in GPU memory."""
        self.rows = None


def batch_signature(batch: Any) -> Any:
    """The signature of a batch: batches of equal signature can be stacked."""
    return batch.signature if isinstance(batch, LazyBatch) else signature(batch)


def _num_bytes(batch: Any) -> int:
    if isinstance(batch, LazyBatch):
        return batch.num_bytes
    return num_bytes(leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor))
