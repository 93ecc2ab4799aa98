"""A rank's report of its round; each field declares how the ranks' values are joined."""

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
        default: The default value, or a type that is called to create it.
        join: Joins the values of all ranks into one.
        is_secret: Whether it reveals something about a client's data; under secure aggregation only its sum over all
            ranks is then revealed.
    """
    metadata = {"join": join, "is_secret": is_secret}
    if isinstance(default, type):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


def _concatenated(values: list[list[T]]) -> list[T]:
    return [value for own in values for value in own]


def _union(values: list[list[str]]) -> list[str]:
    return sorted(set(_concatenated(values)))


def _first(values: list[T]) -> T:
    return values[0]


def _longest(values: list[ScheduleEnd | None]) -> ScheduleEnd | None:
    reached = [value for value in values if value is not None]
    # Among equals `max` takes the first, and all ranks hold the reports in the order of the ranks, so they agree.
    return max(reached, key=lambda end: end.num_optimizer_steps, default=None)


@dataclass(frozen=True)
class RankReport:
    """A rank's report of its round; :meth:`join` joins the reports of all ranks into one.

    Args:
        num_clients: Number of accepted updates.
        weight: The sum of their weights.
        num_steps: Optimizer steps of all clients.
        num_examples: Total number of examples of all clients, in one pass each.
        squared_norm: The weighted sum of the updates' squared norms.
        schedule_end: The progress of the schedules on the client with the most steps.
        refused: Clients whose update was not finite.
        lost: Clients that dropped out before their update was added.
        empty: Clients without data.
        failed: Clients whose loader raised, each with a description of the error.
        client_seconds: Training time of each client in seconds, if the simulated clock uses it.
        moved: Frozen parameters that the clients' training has written to.
        metrics: The values that the clients have logged.
        metric_states: For each torchmetric that was updated, a description of its state, which is in ``tensors``.
            Joined by :class:`~lightning_fl.strategies.metric_states.MetricStates`, from the reports of all ranks.
        has_late_values: Whether values are still logged after the round has been closed.
        logger_steps: The steps by which the loggers' x-axis advances.
        should_stop: Whether training should stop.
        deferred_checkpoints: The checkpoints requested inside the round, the same on all ranks: by path, whether they
            hold weights only.
        grouping: What the ranks have found out about training clients together.
        tensors: Tensors that are sent with the report.
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
    client_seconds: list[tuple[ClientId, float]] = _joined(list, _concatenated)
    moved: list[str] = _joined(list, _union)
    metrics: Entries = _joined(dict, merge_entries)
    metric_states: dict[str, Any] = _joined(dict, _first)
    has_late_values: bool = _joined(False, any)
    logger_steps: int = _joined(0, sum, is_secret=True)
    should_stop: bool = _joined(False, any)
    deferred_checkpoints: dict[str, bool] = _joined(dict, _first)
    grouping: list[dict[str, Any]] = _joined(list, _concatenated)
    tensors: Tree = _joined(dict, _first)

    def to_message(self) -> Message:
        """The report as a message; the aggregator adds ``num_clients`` and ``weight``."""
        own = {name.name: getattr(self, name.name) for name in fields(self) if name.name != "tensors"}
        # Encoded, because options hold tuples, such as Adam's betas, and tensors, which JSON would change or refuse.
        own["schedule_end"] = None if self.schedule_end is None else encode(asdict(self.schedule_end))
        return Message(own, self.tensors)

    @classmethod
    def from_message(cls, message: Message) -> RankReport:
        """Reads the report from a message of :meth:`to_message` to which the aggregator has added its fields.

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
        # JSON has turned the pairs into lists.
        own["failed"] = [(client, error) for client, error in own["failed"]]
        return cls(**own, tensors=message.tensors)

    @classmethod
    def join(cls, reports: Sequence[RankReport]) -> RankReport:
        """Joins the reports of all ranks into one."""
        return cls(
            **{name.name: name.metadata["join"]([getattr(own, name.name) for own in reports]) for name in fields(cls)}
        )

    @classmethod
    def of_silo(cls, reports: Sequence[RankReport]) -> RankReport:
        """The report of a silo from the reports of its processes, which have trained one client together."""
        joined = cls.join(reports)
        return replace(
            reports[0],
            metrics=joined.metrics,
            moved=joined.moved,
            has_late_values=joined.has_late_values,
            should_stop=joined.should_stop,
        )

    def without_steps(self) -> RankReport:
        """The report without the number of optimizer steps, which is not needed if no schedule has stepped."""
        end = self.schedule_end
        if end is None:
            return self
        # These reveal whether gradients have overflowed, and how small a loss has become.
        end = replace(end, scaler={}, states={})
        # The largest number of optimizer steps on a rank reveals the size of its largest client.
        return replace(self, schedule_end=end if any(end.num_steps) else replace(end, num_optimizer_steps=0))


SECRET_FIELDS = tuple(name.name for name in fields(RankReport) if name.metadata["is_secret"])
"""The fields of which only the sum over all ranks is revealed under secure aggregation."""
