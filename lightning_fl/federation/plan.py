"""The plan of a round on one rank: which batch, by its index, belongs to which client."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lightning_fl.types import ClientId


@dataclass(frozen=True)
class BatchPosition:
    """Where a batch stands in the round.

    Args:
        client: Index among the plan's ``units``: of its client, a phase of its client, or the clients trained together.
        starts_window: Whether gradients start to accumulate here.
        ends_window: Whether the optimizer steps here.
        ends_client: Whether it is the last batch of its client, or phase of a client.
        ends_round: Whether it is this rank's last batch.
        offset: Its index among the client's batches, or those of the phase; of several clients, that of their steps.
    """

    client: int
    starts_window: bool
    ends_window: bool
    ends_client: bool
    ends_round: bool
    offset: int


class RoundPlan:
    """What one rank does in a round.

    Args:
        round: Number of the round.
        cohort: The clients of the round, on all ranks.
        clients: Those of this rank, in the order of training; each has at least one batch. One that trains in several
            phases stands there once for each.
        segments: For each of them the numbers of batches of its segments, None where unknown until :meth:`resolve`.
        accumulate: Batches an optimizer step takes together.
        units: The clients again, those together that train side by side. None: each alone.
        num_steps_of: In how many steps such clients train. None: all of them train in each.
    """

    def __init__(
        self,
        round: int,
        cohort: Sequence[ClientId],
        clients: Sequence[ClientId],
        segments: Sequence[Sequence[int | None]],
        accumulate: int = 1,
        units: Sequence[Sequence[ClientId]] | None = None,
        num_steps_of: Callable[[Sequence[ClientId]], int | None] = lambda unit: None,
    ) -> None:
        self.round = round
        self.cohort = list(cohort)
        self.clients = list(clients)
        self.units: list[tuple[ClientId, ...]]
        self.units = [(client,) for client in clients] if units is None else [tuple(unit) for unit in units]
        self.accumulate = accumulate
        self._own = dict(zip(clients, segments, strict=True))
        self._num_steps_of = num_steps_of
        if units is None:
            self._segments = [(client, length) for client, lengths in enumerate(segments) for length in lengths]
        else:
            self._segments = [pair for index, unit in enumerate(self.units) for pair in self._segments_of(index, unit)]
        self._ends_empty = not self.clients
        self._ends: list[int] = []
        self._first = [0] * len(self.units)
        self._extend()

    @property
    def num_batches(self) -> int | None:
        """Batches of this rank, None if unknown; a rank that has no client left gets one empty batch at the end."""
        if len(self._ends) < len(self._segments):
            return None
        return (self._ends[-1] if self._ends else 0) + self._ends_empty

    def is_empty(self, batch_idx: int) -> bool:
        """Whether the batch with this index is the empty one at the end."""
        return self._ends_empty and len(self._ends) == len(self._segments) and batch_idx + 1 == self.num_batches

    def cut(self, batch_idx: int) -> None:
        """Leaves out the client whose batch ``batch_idx`` was to come: the next client's batches come instead."""
        segment = bisect_right(self._ends, batch_idx)
        client = self._segments[segment][0]
        start = self._ends[segment - 1] if segment else 0
        (name,) = self.units[client]
        rest = [(other, length) for other, length in self._segments[segment:] if self.units[other] != (name,)]
        done = [(client, batch_idx - start)] if batch_idx > start else []
        self._segments = [*self._segments[:segment], *done, *rest]
        self._ends_empty = self._ends_empty or not rest
        self._restart()

    def own_length(self, client: ClientId) -> int:
        """Batches of a client that trains beside others."""
        return sum(length or 0 for length in self._own[client])

    def set_num_steps(self, index: int, num_steps: int | None) -> None:
        """Tells what ``num_steps_of`` does, of the clients of the unit at ``index``, of which no batch was trained."""
        self._put(index, self._segments_in(index, self.units[index], num_steps))
        self._restart()

    def split(self, index: int, parts: Sequence[Sequence[ClientId]]) -> None:
        """Divides the clients of the unit at ``index``, of which no batch has been trained, among several units."""
        own = [pair for number, part in enumerate(parts) for pair in self._segments_of(index + number, part)]
        self._put(index, own, len(parts))
        self.units[index : index + 1] = [tuple(part) for part in parts]
        self._ends_empty = self._ends_empty or all(unit < index for unit, _ in self._segments)
        self._restart()

    def separate(self, index: int) -> None:
        """Lets the clients of the units from ``index`` on train alone, in the order of ``clients``."""
        together = {client for unit in self.units[index:] for client in unit}
        rest = [client for client in self.clients if client in together]
        own = [pair for number, client in enumerate(rest) for pair in self._segments_of(index + number, [client])]
        self._segments = [(unit, length) for unit, length in self._segments if unit < index] + own
        self.units[index:] = [(client,) for client in rest]
        self._restart()

    def _put(self, index: int, own: Sequence[tuple[int, int | None]], num_units: int = 1) -> None:
        before = [(unit, length) for unit, length in self._segments if unit < index]
        after = [(unit + num_units - 1, length) for unit, length in self._segments if unit > index]
        self._segments = [*before, *own, *after]

    def _segments_of(self, index: int, unit: Sequence[ClientId]) -> list[tuple[int, int | None]]:
        return self._segments_in(index, unit, self._num_steps_of(unit) if len(unit) > 1 else None)

    def _segments_in(self, index: int, unit: Sequence[ClientId], num_steps: int | None) -> list[tuple[int, int | None]]:
        return [(index, length) for length in (self._own[unit[0]] if num_steps is None else [num_steps])]

    def _restart(self) -> None:
        self._first = [0] * len(self.units)
        self._ends.clear()
        self._extend()

    def resolve(self, num_batches: int) -> None:
        """Tells the length of the segment at hand, before its last batch is trained."""
        position = len(self._ends)
        self._segments[position] = (self._segments[position][0], num_batches)
        self._extend()

    def locate(self, batch_idx: int) -> BatchPosition:
        """The place of the batch with this index in the round."""
        segment = bisect_right(self._ends, batch_idx)
        client = self._segments[segment][0]
        start = self._ends[segment - 1] if segment else 0
        ends_segment = segment < len(self._ends) and batch_idx + 1 == self._ends[segment]
        last_segment = segment + 1 == len(self._segments)
        offset = batch_idx - start
        return BatchPosition(
            client=client,
            starts_window=offset % self.accumulate == 0,
            ends_window=(offset + 1) % self.accumulate == 0 or ends_segment,
            ends_client=ends_segment and (last_segment or self._segments[segment + 1][0] != client),
            ends_round=ends_segment and last_segment,
            offset=batch_idx - self._first[client],
        )

    def _extend(self) -> None:
        while len(self._ends) < len(self._segments):
            position = len(self._ends)
            client, length = self._segments[position]
            start = self._ends[-1] if self._ends else 0
            if position == 0 or self._segments[position - 1][0] != client:
                self._first[client] = start
            if length is None:
                return
            self._ends.append(start + length)
