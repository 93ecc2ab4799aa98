"""Splits a rank's report into public fields and values that are revealed only as sums over all ranks."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from lightning_fl.clients import LocalWork
from lightning_fl.communication import Message
from lightning_fl.federation.errors import ConfigurationError
from lightning_fl.federation.metric_entries import Entry
from lightning_fl.federation.report import SECRET_FIELDS
from lightning_fl.federation.settings import FederationSettings


def mask(report: Message) -> Message:
    """Moves everything that reveals something about a client's data into the field ``"sums"``: numbers by name.

    The following stays public: names and settings of metrics, shapes of their states, which clients were refused, empty
    or failed, and requests to stop or to save a checkpoint.

    Raises:
        ConfigurationError: If a metric is neither a mean nor a sum, so that it can't be computed from a sum.
    """
    public, sums = dict(report.fields), {}
    for name in SECRET_FIELDS:
        if name in public:
            sums[name] = float(public[name])
            # The field stays, as 0: a report that lacks a field is refused, and joining reports adds up the ranks'
            # values.
            public[name] = 0
    public["metrics"] = {key: _mask_entry(key, entry, sums) for key, entry in public["metrics"].items()}
    public["metric_states"] = {
        name: _mask_state(name, state, report, sums) for name, state in public["metric_states"].items()
    }
    return Message({**public, "sums": sums})


def unmask(reports: list[Message]) -> list[Message]:
    """Replaces the values that :func:`mask` removed by the sums over all ranks, which the first report holds.

    Raises:
        ConfigurationError: On every rank, if one of them logs values after the sum.
    """
    if any(report.fields.get("has_late_values") for report in reports):
        raise ConfigurationError(
            "Something is logged with on_epoch=True in `on_train_batch_end`, whose last values come after the round's "
            "secure sum. Under secure aggregation log it in `training_step`."
        )
    first, *others = reports
    sums: dict[str, float] = first.fields["sums"]
    counts = {
        name: sums[name] if name == "squared_norm" else round(sums[name]) for name in SECRET_FIELDS if name in sums
    }
    settings: dict[str, Any] = {}
    states: dict[str, Any] = {}
    # A rank without clients has logged nothing, so no single report names all metrics.
    for message in reports:
        settings.update(message.fields["metrics"])
        states.update(message.fields["metric_states"])
    logged = {key: entry for key, entry in settings.items() if all(name in sums for name in _names_of_entry(key))}
    updated = {name: own for name, own in states.items() if all(part in sums for part in _names_of_state(name, own))}
    few = [entry["name"] for key, entry in settings.items() if key not in logged]
    few += [name for name in states if name not in updated]
    if few:
        warnings.warn(
            f"Too few silos have logged {', '.join(map(repr, dict.fromkeys(few)))} for a secure sum that is not their "
            "own, so it is left out. Let all silos log the same.",
            stacklevel=2,
        )
    tensors = {}
    for name, state in updated.items():
        for key, (shape, dtype) in state["shapes"].items():
            values = [sums[f"state {name} {key} {index}"] for index in range(math.prod(shape))]
            value = torch.tensor(values, dtype=torch.float64).reshape(shape)
            kind = getattr(torch, dtype)
            # Rounded, because truncation would lose one where a sum has come out just below the whole number.
            tensors[f"{name}/{key}/0"] = value.to(kind) if kind.is_floating_point else value.round().to(kind)
    joined = {
        **first.fields,
        **counts,
        "metrics": {key: _unmask_entry(key, entry, sums) for key, entry in logged.items()},
        "metric_states": {
            name: {"count": round(sums[f"state {name}"]), "lengths": dict.fromkeys(state["shapes"])}
            for name, state in updated.items()
        },
    }
    # The sums are in the first report only: joining adds up the metrics of all reports and would count them once per
    # rank.
    empty: dict[str, Any] = {"metrics": {}, "metric_states": {}}
    return [Message(joined, tensors), *(Message({**message.fields, **empty}, {}) for message in others)]


def forbid_client_disclosure(what: str, settings: FederationSettings) -> None:
    """Refuses a feature that shows a silo's figures to the others, or a client's figures where clients are private.

    Args:
        what: The feature, as the error names it.
        settings: The federation's settings.

    Raises:
        ConfigurationError: If silos hide their figures, or a transform hides the clients of a round.
    """
    if settings.hides_silos:
        raise ConfigurationError(
            f"{what} shows every silo's own figures to the others, which secure aggregation is meant to prevent. Leave "
            "out one of them."
        )
    if settings.hides_clients:
        names = ", ".join(type(transform).__name__ for transform in settings.transforms if transform.hides_clients)
        raise ConfigurationError(
            f"{what} shows exact figures of single clients, which {names} is meant to prevent. Leave out one of them."
        )


def check_steps(what: str, settings: FederationSettings, work: LocalWork) -> None:
    """Refuses a feature that reveals how much data each silo has.

    Args:
        what: The feature, as the error names it.
        settings: The federation's settings.
        work: The local work of a client.

    Raises:
        ConfigurationError: If silos hide it, and may take different numbers of steps in a phase of local training.
    """
    by_epochs = any(work.for_phase(phase).steps is None for phase in settings.algorithm.phases())
    if settings.hides_silos and by_epochs:
        raise ConfigurationError(
            f"{what} needs the number of steps of the largest silo, which secure aggregation hides. Give all silos the "
            "same number with FederatedStrategy(local_steps=...) and an algorithm that has no phase of epochs of its "
            "own, or step schedules by epoch."
        )


def _names_of_entry(key: str) -> list[str]:
    return [f"metric {key} {part}" for part in ("value", "not finite", "weight")]


def _names_of_state(name: str, state: dict[str, Any]) -> Iterator[str]:
    yield f"state {name}"
    for key, (shape, _) in state["shapes"].items():
        yield from (f"state {name} {key} {index}" for index in range(math.prod(shape)))


def _mask_entry(key: str, entry: Entry, sums: dict[str, float]) -> Entry:
    if entry["reduction"] not in ("mean", "sum"):
        raise ConfigurationError(
            f"{entry['name']!r} is logged with reduce_fx={entry['reduction']!r}, which a secure sum can't give: each "
            "rank would learn the others' values. Log a mean or a sum, or leave it out."
        )
    value = float(entry["value"])
    is_finite = math.isfinite(value)
    # A secure sum adds finite numbers only, so that other values are sent as a count.
    sums[f"metric {key} value"] = value if is_finite else 0.0
    sums[f"metric {key} not finite"] = float(not is_finite)
    sums[f"metric {key} weight"] = float(entry["weight"])
    return {**entry, "value": 0.0, "weight": 0.0}


def _unmask_entry(key: str, entry: Entry, sums: dict[str, float]) -> Entry:
    value = math.nan if round(sums[f"metric {key} not finite"]) else sums[f"metric {key} value"]
    return {**entry, "value": value, "weight": sums[f"metric {key} weight"]}


def _mask_state(name: str, state: dict[str, Any], report: Message, sums: dict[str, float]) -> dict[str, Any]:
    if not state["is_sum"]:
        raise ConfigurationError(
            f"The torchmetric {name!r} keeps more than sums (its predictions, a maximum, ...), which a secure sum "
            "can't give. Take its binned form (thresholds=...), or leave it out."
        )
    sums[f"state {name}"] = float(state["count"])
    shapes = {}
    for key in state["lengths"]:
        tensor = report.tensors[f"{name}/{key}/0"]
        shapes[key] = list(tensor.shape), str(tensor.dtype).removeprefix("torch.")
        for index, value in enumerate(tensor.double().reshape(-1).tolist()):
            sums[f"state {name} {key} {index}"] = value
    return {"shapes": shapes}
