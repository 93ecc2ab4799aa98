"""Describes in words how two parties that are about to train together differ."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from typing import Any


class Disagreement(ValueError):
    """Raised if parties that are about to train together would not train the same thing."""


MAX_DIFFERENCES = 8
_MAX_NAMES = 12


def differences(expected: Mapping[str, Any], found: Mapping[str, Any], who: str, reference: str) -> list[str]:
    """A phrase for each name whose values differ.

    Lists, such as the names of a table's columns, are described by the added and missing items, or by their order.

    Args:
        expected: One party's values, by name.
        found: The other party's values.
        who: The other party's name in the phrases.
        reference: The first party's name in the phrases.
    """
    names = dict.fromkeys([*expected, *found])
    return [
        f"{name!r} {_difference(expected.get(name), found.get(name), who, reference)}"
        for name in names
        if expected.get(name) != found.get(name)
    ]


def several(phrases: list[str]) -> str:
    """Joins the first phrases, and adds the number of further ones."""
    more = len(phrases) - MAX_DIFFERENCES
    return "; ".join(phrases[:MAX_DIFFERENCES]) + (f"; and {more} more" if more > 0 else "")


def _difference(expected: Any, found: Any, who: str, reference: str) -> str:
    both = isinstance(expected, str) and isinstance(found, str) and ", " in expected and ", " in found
    if not both or "(" in expected + found:  # a call such as FedProx(mu=0.1, server_lr=1.0) is no list
        return f"is {_or_missing(found)} on {who} and {_or_missing(expected)} on {reference}"
    own, others = found.split(", "), expected.split(", ")
    if sorted(own) == sorted(others):
        at = next(place for place, pair in enumerate(zip(own, others, strict=True)) if pair[0] != pair[1])
        return f"are in another order: number {at + 1} is {own[at]} on {who} and {others[at]} on {reference}"
    more, fewer = [name for name in own if name not in others], [name for name in others if name not in own]
    parts = [f"{verb} {_some(names)}" for verb, names in (("have", more), ("lack", fewer)) if names]
    return f"on {who} {' and '.join(parts)}, unlike those on {reference}"


def _some(names: list[str]) -> str:
    return ", ".join(islice(names, _MAX_NAMES)) + (", ..." if len(names) > _MAX_NAMES else "")


def _or_missing(value: Any) -> Any:
    return "missing" if value is None else value
