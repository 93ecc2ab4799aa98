"""The schema that silos need to train together on tables, learned without pooling their rows."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lightning_fl.aggregation import Aggregator
from lightning_fl.analytics.analysis import MIN_COUNT, analyze, clients_of
from lightning_fl.analytics.counts import Frequency
from lightning_fl.analytics.moments import Variance
from lightning_fl.analytics.question import by_value, complete, labels, numbers
from lightning_fl.communication import Group, LocalGroup, Message
from lightning_fl.datamodules.table_schema import MAX_CATEGORIES, MAX_CLASSES, TableSchema, Task, is_number

UNIT_FACTOR = 3.0
"""Medians that differ by more than this factor, of values that hardly overlap, are reported as different units."""
QUARTILES = (0.25, 0.5, 0.75)


@dataclass(frozen=True)
class FederatedSchema:
    """A schema for all silos, and the differences between them.

    Args:
        schema: The schema that every silo gives its ``TabularDataModule``.
        notes: Differences that do not prevent training, one line each, which names the client.
    """

    schema: TableSchema
    notes: Sequence[str]


def federated_schema(
    data: Any,
    target: str,
    client: str | None = None,
    group: Group | None = None,
    aggregator: Aggregator | None = None,
    drop: Sequence[str] = (),
    task: Task = "auto",
    categories: Mapping[str, Sequence[str]] | None = None,
    min_count: int = MIN_COUNT,
) -> FederatedSchema:
    """Agrees on columns, categories, classes and scaling; each rank of a federation must call it.

    Clients exchange the names and kinds of their columns and, except under secure aggregation, the categories and
    quartiles of their columns. Means and deviations are computed over all rows, so keep test rows in other files.

    Args:
        data: The rows, as for :func:`analyze`.
        target: The column to predict.
        client: The column that names the client of a row.
        group: The ranks of the federation. None: this process.
        aggregator: Computes the sums, as for :func:`analyze`.
        drop: Columns to leave out.
        task: As for ``TabularDataModule``.
        categories: The values of text columns and of the target's classes, if they are public. Required for secure
            aggregation.
        min_count: A client reveals no category that fewer of its rows have, and no quartiles of fewer rows.

    Raises:
        ValueError: On every rank, if clients lack a column, misspell it, or have text instead of numbers. The message
            names each client and its fault.
    """
    group, declared = group or LocalGroup(), dict(categories or {})
    tables, *_ = clients_of(data, client, group)
    hidden = aggregator is not None and aggregator.integer_bits is not None
    left_out = {client, *drop}
    own = {str(name): _describe(table, target, left_out, declared, hidden, min_count) for name, table in tables.items()}
    gathered = group.all_gather(Message({"clients": own}), "columns of tables")
    found: dict[str, dict[str, Any]] = {}
    for message in gathered:
        found.update(message.fields["clients"])
    columns, notes = _compare_columns(found, target)
    kinds = {column: _kind([client[column]["kind"] for client in found.values()]) for column in columns}
    numeric = [column for column in columns if kinds[column] == "number" and column != target]
    text = [column for column in columns if kinds[column] == "text" and column != target]
    values = {column: _union(found, column, declared) for column in [*text, target]}
    questions = [*(Variance(column, ddof=0) for column in numeric)]
    questions_of_text = [Frequency(column, tuple(values[column])) for column in text]
    answers = analyze([*questions, *questions_of_text], data, client, group, aggregator, min_count=min_count).answers
    scaling = {}
    for column, answer in zip(numeric, answers, strict=False):
        mean, std = answer.values.get("mean", 0.0), answer.values.get("std", 1.0)
        scaling[column] = (mean, std if std > 0 else 1.0)
        if answer.withheld:
            notes.append(f"{column!r} is not scaled, because {answer.withheld}")
    listed = {}
    for column, answer in zip(text, answers[len(numeric) :], strict=True):
        listed[column] = [value for value, count in answer.parts.items() if not getattr(count, "withheld", "")]
        if len(answer.parts) > len(listed[column]) or any(client[column].get("rare") for client in found.values()):
            notes.append(f"values of {column!r} that too few rows of every client have, if any, are left out")
    if values[target] and any(client[target].get("rare") for client in found.values()):
        notes.append(
            f"classes of {target!r} that too few rows of every client have, if any, are left out: name them in "
            "categories"
        )
    notes += _missing_categories(found, listed, min_count) + _units(found, numeric)
    schema = TableSchema(target, scaling, listed, _classes(values[target], kinds[target], target, task), origin="data")
    return FederatedSchema(schema, notes)


def _describe(
    table: Any, target: str, left_out: set[str | None], declared: Mapping[str, Any], hidden: bool, min_count: int
) -> dict[str, Any]:
    """A client's description of its columns."""
    told: dict[str, Any] = {}
    for column in table.columns:
        if column in left_out:
            continue
        values = table[column]
        is_empty = not values.notna().any()
        kind = "empty" if is_empty else "number" if is_number(values) else "text"
        if kind == "number" and values.dtype.kind == "b":
            kind = "bool"
        told[str(column)] = {"kind": kind}
        if hidden or column in declared or is_empty:
            continue
        if kind == "text" or column == target:
            counts = Counter(label for label in labels(table, column) if label is not None)
            different = by_value([label for label, count in counts.items() if count >= min_count])
            limit = MAX_CATEGORIES if kind == "text" else MAX_CLASSES
            # The values of a numeric target identify single rows.
            told[str(column)]["values"] = different if len(counts) <= limit else None
            told[str(column)]["rare"] = len(different) < len(counts)
        elif kind == "number":
            present = complete(numbers(table, column))[:, 0]
            if len(present) >= min_count:
                told[str(column)]["quartiles"] = np.quantile(present, QUARTILES).tolist()
    return told


def _compare_columns(found: Mapping[str, Mapping[str, Any]], target: str) -> tuple[list[str], list[str]]:
    """The columns of most clients, in the order of the first, and harmless differences.

    Raises:
        ValueError: If a client differs in a way that prevents training.
    """
    counts = Counter(column for client in found.values() for column in client)
    agreed = {column for column, count in counts.items() if 2 * count > len(found)} | {target}
    orders = [[column for column in client if column in agreed] for client in found.values()]
    columns = max(orders, key=lambda order: (len(order), orders.count(order)))
    errors, notes = [], []
    for client, told in found.items():
        extra = [column for column in told if column not in agreed]
        for column in sorted(agreed - told.keys()):
            close = difflib.get_close_matches(column, extra, n=1, cutoff=0.6)
            errors.append(f"{client} has no column {column!r}" + (f"; it has {close[0]!r}" if close else ""))
        errors += [
            f"{client} has {column!r} as {told[column]['kind']}, most others as {kind}"
            for column in sorted(agreed & told.keys())
            if told[column]["kind"]
            not in ("empty", kind := _kind([c[column]["kind"] for c in found.values() if column in c]))
        ]
        if extra and not agreed - told.keys():
            notes.append(f"{client} has additional columns, which are not used: {', '.join(extra)}")
        order = [column for column in told if column in agreed]
        if order != [column for column in columns if column in told]:
            notes.append(f"{client} has its columns in another order, which has no effect: they are read by name")
    if errors:
        raise ValueError("The clients can't train on these tables together:\n  " + "\n  ".join(errors))
    return columns, notes


def _kind(kinds: Sequence[str]) -> str:
    present = Counter(kind for kind in kinds if kind != "empty")
    return present.most_common(1)[0][0] if present else "number"


def _union(found: Mapping[str, Mapping[str, Any]], column: str, declared: Mapping[str, Sequence[str]]) -> list[str]:
    """The declared values, or those that the clients name; none for a numeric column with many values."""
    if column in declared:
        return [str(value) for value in declared[column]]
    named = [client[column].get("values", []) for client in found.values() if client[column]["kind"] != "empty"]
    if any(values is None for values in named):
        if _kind([client[column]["kind"] for client in found.values()]) == "text":
            raise ValueError(
                f"Column {column!r} is text with more than {MAX_CATEGORIES} different values; leave it out with drop, "
                "or merge some of its values."
            )
        return []
    return by_value([str(value) for values in named for value in values])


def _classes(values: Sequence[str], kind: str, target: str, task: Task) -> list[Any] | None:
    if task == "regression" or (kind == "number" and not 0 < len(values) <= MAX_CLASSES and task == "auto"):
        return None
    if len(values) < 2:
        raise ValueError(
            f"The target {target!r} has {len(values)} known classes; expected at least 2. Give its values in "
            "categories, or task='regression' for a number."
        )
    if kind == "bool":
        return [value == "True" for value in values]
    if kind == "number":
        return [int(value) if float(value).is_integer() else float(value) for value in values]
    return sorted(values)


def _missing_categories(
    found: Mapping[str, Mapping[str, Any]], listed: Mapping[str, Sequence[str]], min_count: int
) -> list[str]:
    return [
        f"{client} has fewer than {min_count} rows with {column} = {', '.join(map(repr, lacking[:5]))}"
        for client, told in found.items()
        for column, values in listed.items()
        if "values" in told[column] and (lacking := [value for value in values if value not in told[column]["values"]])
    ]


def _units(found: Mapping[str, Mapping[str, Any]], numeric: Sequence[str]) -> list[str]:
    """Notes on columns that a client seems to measure in another unit: its quartiles are a multiple of the others'."""
    notes = []
    for column in numeric:
        told = {client: info[column]["quartiles"] for client, info in found.items() if "quartiles" in info[column]}
        for client, own in told.items():
            others = [quartiles for other, quartiles in told.items() if other != client]
            far = [quartiles for quartiles in others if _is_another_unit(own, quartiles)]
            # If a few clients use another unit, report these, not those from which they differ.
            if 2 * len(far) > len(others):
                theirs = sorted(quartiles[1] for quartiles in far)[len(far) // 2]
                notes.append(
                    f"{client} has {column!r} about {own[1] / theirs:.3g} times as large as others (median "
                    f"{own[1]:.4g}, theirs {theirs:.4g}). Check its unit."
                )
    return notes


def _is_another_unit(own: Sequence[float], other: Sequence[float]) -> bool:
    (low, median, high), (other_low, other_median, other_high) = own, other
    apart = low > other_high or high < other_low
    return apart and median * other_median > 0 and not 1 / UNIT_FACTOR <= median / other_median <= UNIT_FACTOR
