"""Logged values as plain data (settings, value and weight by key), to be summed over batches, clients and ranks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

Entry = dict[str, Any]
"""The settings of a log call (``name``, ``reduction``, ``on_step``, ...), and the summed ``value`` and ``weight``."""
Entries = dict[str, Entry]


def add_entry(entries: Entries, key: str, entry: Entry) -> None:
    """Adds a value to those logged under the same key, by its own reduction."""
    if key not in entries:
        # A copy, because later values are added in place, and the caller's entry must not change.
        entries[key] = dict(entry)
        return
    total, reduction = entries[key], entry["reduction"]
    if reduction in ("mean", "sum"):
        total["value"] = total["value"] + entry["value"]
    else:
        # Unlike Python's `min` and `max`, torch's give NaN in either order, so the result does not depend on the order.
        both = torch.as_tensor(total["value"]), torch.as_tensor(entry["value"])
        total["value"] = (torch.minimum if reduction == "min" else torch.maximum)(*both)
    total["weight"] = total["weight"] + entry["weight"]


def merge_entries(parts: Iterable[Entries]) -> Entries:
    """Merges the entries of several ranks."""
    merged: Entries = {}
    for entries in parts:
        for key, entry in entries.items():
            add_entry(merged, key, entry)
    return merged


def value_of(entry: Entry) -> float:
    """The final value of an entry: for a mean, its sum divided by its weight."""
    value, weight = float(entry["value"]), float(entry["weight"])
    if entry["reduction"] != "mean":
        return value
    return value / weight if weight else float("nan")


def as_numbers(entries: Entries) -> Entries:
    """The entries with numbers instead of tensors, for a message."""
    return {
        key: {**entry, "value": float(entry["value"]), "weight": float(entry["weight"])}
        for key, entry in entries.items()
    }
