"""What a rank tells the others of its round: each field is declared once, with how the ranks' values are joined."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, TypeVar

from lightning_fl.communication import Message
from lightning_fl.communication.objects import decode, encode
from lightning_fl.engines import ScheduleEnd
from lightning_fl.federation.metric_entries import Entries, merge_entries
from lightning_fl.types import ClientId, Tree

T = TypeVar("T")


def _joined(default: Any, join: Callable[[list[Any]], Any], *, is_secret: bool = False) -> Any:
    """A field of a report.

    Args:
        default: Its value, or a type to be called for it.
        join: Makes one value of those of all ranks.
        is_secret: Whether it tells of a client's data, so that behind a secure sum only the sum is told.
    """
    metadata = {"join": join, "is_secret": is_secret}
    if isinstance(default, type):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def _concatenated(values: list[list[T]]) -> list[T]:
    return [value for own in values for value in own]


def _first(values: list[T]) -> T:
    return values[0]


def _common(values: list[str]) -> str:
    """The value that several ranks have in common, all of them; else an empty string."""
    return values[0] if len(values) > 1 and len(set(values)) == 1 else ""


def _longest(values: list[ScheduleEnd | None]) -> ScheduleEnd | None:
    reached = [value for value in values if value is not None]
    return max(reached, key=lambda end: end.num_optimizer_steps, default=None)


@dataclass(frozen=True)
class RankReport:
    """A rank's report of its round; :meth:`join` makes one of those of all ranks.

    Args:
        num_clients: Updates that were accepted.
        weight: Their weights, summed.
        num_steps: Optimizer steps of all clients.
        num_examples: Examples of all clients, of one pass each.
        squared_norm: The squared norms of the updates, weighted and summed.
        schedule_end: Where the client with the most steps has taken the schedules.
        refused: Clients whose update was not finite.
        lost: Clients that vanished before their update was added.
        empty: Clients without data.
        failed: Clients whose loader raised, and what.
        metrics: What the clients have logged.
        metric_states: Of each torchmetric that was updated, the description of its state; the states are ``tensors``.
            Joined by :class:`~lightning_fl.strategies.metric_states.MetricStates`, from the reports of all ranks.
        has_late_values: Whether values are still logged after the round has been closed.
        first_batch: A digest of the first batch, to find ranks with the same data by mistake.
        logger_steps: By how much the loggers' x-axis advances.
        should_stop: Whether training is to stop.
        deferred_checkpoints: By path the checkpoints that were asked for inside the round, and whether they hold
            weights only; the ranks ask for the same.
        tensors: Tensors that travel with the report.
    """

    num_clients: int = _joined(0, sum)
    weight: float = _joined(0.0, sum)
    num_steps: int = _joined(0, sum, is_secret=True)
    num_examples: int = _joined(0, sum, is_secret=True)
    squared_norm: float = _joined(0.0, sum, is_secret=True)
    schedule_end: ScheduleEnd | None = _joined(None, _longest)
    refused: list[ClientId] = _joined(list, _concatenated)
    lost: list[ClientId] = _joined(list, _concatenated)
    empty: list[ClientId] = _joined(list, _concatenated)
    failed: list[tuple[ClientId, str]] = _joined(list, _concatenated)
    metrics: Entries = _joined(dict, merge_entries)
    metric_states: dict[str, Any] = _joined(dict, _first)
    has_late_values: bool = _joined(False, any)
    first_batch: str = _joined("", _common)
    logger_steps: int = _joined(0, sum, is_secret=True)
    should_stop: bool = _joined(False, any)
    deferred_checkpoints: dict[str, bool] = _joined(dict, _first)
    tensors: Tree = _joined(dict, _first)

    def to_message(self) -> Message:
        """The report as a message; the aggregator adds ``num_clients`` and ``weight``."""
        own = {name.name: getattr(self, name.name) for name in fields(self) if name.name != "tensors"}
        own["schedule_end"] = None if self.schedule_end is None else encode(asdict(self.schedule_end))
        return Message(own, self.tensors)

    @classmethod
    def from_message(cls, message: Message) -> RankReport:
        """The report that :meth:`to_message` made of it, once the aggregator has passed it on.

        Raises:
            ValueError: If a field is missing.
        """
        names = [name.name for name in fields(cls) if name.name != "tensors"]
        missing = [name for name in names if name not in message.fields]
        if missing:
            raise ValueError(
                f"A rank's report lacks {', '.join(missing)}. Start all ranks with the same version of lightning_fl."
            )
        own = {name: message.fields[name] for name in names}
        end = own["schedule_end"]
        own["schedule_end"] = None if end is None else ScheduleEnd(**decode(end))
        own["failed"] = [(client, error) for client, error in own["failed"]]
        return cls(**own, tensors=message.tensors)

    @classmethod
    def join(cls, reports: Sequence[RankReport]) -> RankReport:
        """The report of all ranks together."""
        return cls(
            **{name.name: name.metadata["join"]([getattr(own, name.name) for own in reports]) for name in fields(cls)}
        )

    def without_steps(self) -> RankReport:
        """The report without the number of optimizer steps behind schedules that have not stepped."""
        end = self.schedule_end
        if end is None or any(end.num_steps):
            return self
        return replace(self, schedule_end=replace(end, num_optimizer_steps=0))


SECRET_FIELDS = tuple(name.name for name in fields(RankReport) if name.metadata["is_secret"])
"""The fields of which only the sum over all ranks may be told behind a secure sum."""
