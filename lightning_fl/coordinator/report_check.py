"""Validates silos' reports: JSON from the network can have any shape, and is summed and relayed to other silos."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, Strict, ValidationError
from torch import Tensor

from lightning_fl.communication import Message
from lightning_fl.coordinator.wire import BadFile
from lightning_fl.federation import RankReport

Count = Annotated[int, Field(ge=0, lt=1 << 53)]
# JSON has no tuples: a list of the right length is one.
Failure = Annotated[tuple[str, str], Strict(False)]
Seconds = Annotated[tuple[str, FiniteFloat], Strict(False)]
Dtype = Literal["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"]
Shape = Annotated[tuple[list[Count], Dtype], Strict(False)]


class _Fields(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class _Entry(_Fields):
    """A logged value, as :func:`lightning_fl.strategies.results.entry` describes it."""

    fx: str | None
    name: str
    prog_bar: bool
    logger: bool | None
    on_step: bool
    on_epoch: bool
    reduction: Literal["mean", "sum", "min", "max"]
    add_dataloader_idx: bool
    dataloader_idx: int | None
    metric_attribute: str | None
    is_tensor: bool
    dtype: Literal["float32", "float64", ""]
    value: float
    weight: float


class _MetricState(_Fields):
    """A torchmetric's state; its tensors are sent separately."""

    count: Count
    lengths: dict[str, Count | None]
    is_sum: bool


class _SecretState(_Fields):
    """A torchmetric's state whose values are part of a secure sum."""

    shapes: dict[str, Shape]


class _Evaluation(_Fields):
    metrics: dict[str, _Entry]
    metric_states: dict[str, _MetricState | _SecretState]


class _Report(_Evaluation):
    num_clients: Count
    weight: FiniteFloat
    num_steps: Count
    num_examples: Count
    squared_norm: FiniteFloat
    schedule_end: Any
    refused: list[str]
    lost: list[str]
    empty: list[str]
    failed: list[Failure]
    client_seconds: list[Seconds]
    moved: list[str]
    has_late_values: bool
    logger_steps: Count
    should_stop: bool
    deferred_checkpoints: dict[str, bool]
    grouping: Annotated[list[Any], Field(max_length=0)]


class _ScheduleEnd(_Fields):
    num_steps: list[Count]
    options: list[list[dict[str, Any]]]
    num_optimizer_steps: Count
    scaler: dict[str, Any]
    states: dict[int, dict[str, Any]]


def read_report(message: Message, silo: str) -> RankReport:
    """Reads the report that came with a silo's update.

    Raises:
        BadFile: If a field has the wrong type, or the report is about another silo.
    """
    try:
        _check(_Report, message.fields, message.tensors)
        report = RankReport.from_message(message)
        end = report.schedule_end
        if end is not None:
            _ScheduleEnd.model_validate(vars(end))
    except BadFile as error:
        raise BadFile(f"its report can't be read: {error}") from error
    except Exception as error:  # decoding a schedule's options can meet JSON of any shape
        raise BadFile(f"its report can't be read: schedule_end: {type(error).__name__}: {error}") from error
    if not all(isinstance(tensor, Tensor) for tensor in message.tensors.values()):
        raise BadFile("its report can't be read: its tensors are nested")
    pairs = [*report.failed, *report.client_seconds]
    named = {*report.refused, *report.lost, *report.empty, *(client for client, _ in pairs)}
    if not named <= {silo}:
        raise BadFile(f"its report names {', '.join(map(repr, sorted(named)))}")
    return report


def check_evaluation(fields: Mapping[str, Any], tensors: Collection[str]) -> None:
    """Checks a silo's metrics on its validation data.

    Args:
        fields: The message.
        tensors: The names of the tensors that came with it.

    Raises:
        BadFile: If a field has the wrong type.
    """
    _check(_Evaluation, fields, tensors)


def _check(kind: type[_Evaluation], fields: Mapping[str, Any], tensors: Collection[str]) -> None:
    try:
        checked = kind.model_validate(dict(fields))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise BadFile(f"{' '.join(map(str, first['loc']))}: {first['msg']}") from error
    for name, state in checked.metric_states.items():
        if isinstance(state, _SecretState):
            continue
        for key, length in state.lengths.items():
            # The number of tensors first, so that a huge claimed number is not counted to its end.
            count = 1 if length is None else length
            if count > len(tensors) or any(f"{name}/{key}/{index}" not in tensors for index in range(count)):
                raise BadFile(f"the tensors of the state {key!r} of the metric {name!r} are missing")
