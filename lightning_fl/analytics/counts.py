"""Questions that count rows: histograms, quantiles, frequencies and the chi-squared test."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from lightning_fl.analytics.moments import chi2_p
from lightning_fl.analytics.question import (
    Answer,
    Question,
    Range,
    array,
    check_range,
    codes,
    complete,
    numbers,
    tree,
)
from lightning_fl.types import Tree

OTHER = "(other or missing)"


@dataclass(frozen=True)
class Histogram(Question):
    """Counts of a column's values between edges; each bin includes its lower edge, the last one both.

    Args:
        column: The column.
        edges: Two or more increasing numbers, from public knowledge.
    """

    column: str
    edges: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.edges) < 2 or any(b <= a for a, b in pairwise(self.edges)):
            raise ValueError(f"The edges {self.edges} of {self.column!r} must be two or more increasing numbers.")

    @property
    def cuts(self) -> Mapping[str, tuple[Any, ...]]:
        return {self.column: self.edges}

    def local(self, table: Any, state: Any) -> Tree:
        values = complete(numbers(table, self.column))[:, 0]
        counts = np.histogram(values, self.edges)[0]
        return tree(counts=counts, other=len(values) - counts.sum())

    def step(self, total: Tree, state: Any) -> Answer:
        names = [f"{a:g} to {b:g}" for a, b in pairwise(self.edges)]
        counts = dict(zip(names, array(total["counts"]).tolist(), strict=True))
        return Answer(sum(counts.values()), parts=counts, counts={**counts, OTHER: float(total["other"])})

    def sensitivity(self, state: Any) -> float:
        return 1.0


@dataclass(frozen=True)
class Quantile(Question):
    r"""The smallest value :math:`x` with :math:`F(x) \ge q`, found by a search over counts.

    Each step counts the values in equal parts of the remaining interval. Without a range, the interval is all float64
    numbers, and 8 steps of 256 parts find the exact value, which is withheld if fewer than ``min_count`` rows are at
    most, or at least, as large. With a range, the answer is the middle of an interval of width
    :math:`(high - low) / 16^{steps}`.

    Args:
        column: The column; missing values are ignored.
        q: One or more shares, each above 0 and below 1. 0 and 1, the minimum and maximum, are allowed only with a
            range, because they would be a single row's value.
        range: The smallest and largest value, to which values are clipped. Required for differential privacy.
        steps: Number of search steps if there is a range, 1 to 12. Default 4.

    Raises:
        ValueError: If an argument is out of range.
    """

    column: str
    q: tuple[float, ...] = (0.5,)
    range: Range | None = None
    steps: int = 4

    def __post_init__(self) -> None:
        check_range(self.column, self.range)
        if not self.q or not all(0 <= q <= 1 for q in self.q) or not 1 <= self.steps <= 12:
            raise ValueError(
                f"Quantile got q={self.q} and steps={self.steps}; expected shares in [0, 1], 1 to 12 steps."
            )
        if self.range is None and {0, 1} & set(self.q):
            raise ValueError(
                f"The smallest or largest {self.column!r} is a single row's value. Declare a range=(low, high), or "
                "ask for quantiles such as 0.05 and 0.95."
            )

    @property
    def cuts(self) -> Mapping[str, tuple[Any, ...]]:
        return {} if self.range is not None else {f"quantiles of {self.column}": self.q}

    @property
    def _digits(self) -> tuple[int, int]:
        """Number of bits per step, and number of steps."""
        return (8, 8) if self.range is None else (4, self.steps)

    def start(self) -> Any:
        return {"step": 0, "found": [0] * len(self.q), "rank": None}

    def local(self, table: Any, state: Any) -> Tree:
        bits, steps = self._digits
        keys = self._keys(complete(numbers(table, self.column))[:, 0])
        left = np.uint64(bits * (steps - state["step"]))
        shift, mask = np.uint64(int(left) - bits), np.uint64((1 << bits) - 1)
        counts = np.zeros((len(self.q), 1 << bits))
        for row, found in enumerate(state["found"]):
            inside = keys if state["step"] == 0 else keys[keys >> left == np.uint64(found)]
            counts[row] = np.bincount(((inside >> shift) & mask).astype(np.int64), minlength=1 << bits)
        return tree(counts=counts)

    def step(self, total: Tree, state: Any) -> Any:
        bits, steps = self._digits
        counts = array(total["counts"])
        n = state.get("n", float(counts[0].sum()))
        # The rank among the rows of the remaining interval; slightly less, because 0.9 x 10 is above 9 in float64.
        ranks = state["rank"] or [max(1.0, math.ceil(q * n - 1e-9)) for q in self.q]
        found, left = [], []
        for row, rank, before in zip(counts, ranks, state["found"], strict=True):
            below = np.cumsum(row)
            digit = min(int(np.searchsorted(below, rank)), len(row) - 1) if np.all(row >= 0) else _crossing(below, rank)
            found.append((before << bits) + digit)
            left.append(rank - (float(below[digit - 1]) if digit else 0.0))
        if state["step"] + 1 < steps:
            return {"step": state["step"] + 1, "found": found, "rank": left, "n": n}
        values = {f"{q:g}": self._value(key) for q, key in zip(self.q, found, strict=True)}
        if self.range is not None:
            return Answer(n, values)
        # An exact value that few rows exceed reveals about as much as the extreme row itself; and quantiles close to
        # each other would list all rows.
        ranks = sorted({max(1.0, math.ceil(q * n - 1e-9)) for q in self.q})
        gaps = [b - a for a, b in pairwise(ranks)]
        return Answer(n, values, fewest=min([ranks[0], n - ranks[-1] + 1, *gaps]))

    def _keys(self, values: np.ndarray) -> np.ndarray:
        """The values as integers of the same order."""
        if self.range is not None:
            low, high = self.range
            size = 1 << 4 * self.steps
            share = (np.clip(values, low, high) - low) / (high - low)
            return np.minimum((share * size).astype(np.uint64), np.uint64(size - 1))
        raw = (values + 0.0).view(np.uint64)  # + 0.0, because -0 and 0 are equal but differ in their bits
        sign = np.uint64(1 << 63)
        return np.where(raw & sign, ~raw, raw | sign)

    def _value(self, key: int) -> float:
        if self.range is not None:
            low, high = self.range
            return low + (key + 0.5) / (1 << 4 * self.steps) * (high - low)
        raw = key ^ (1 << 63) if key >> 63 else ~key & ((1 << 64) - 1)
        return float(np.array([raw], dtype=np.uint64).view(np.float64)[0])

    def sensitivity(self, state: Any) -> float:
        if self.range is None:
            raise ValueError(
                f"Quantile of {self.column!r} has no declared range. Declare the smallest and largest value from "
                f"public knowledge: range=(low, high), or --range {self.column}=LOW,HIGH."
            )
        return math.sqrt(len(self.q))


def _crossing(below: np.ndarray, rank: float) -> int:
    """The index at which noisy cumulative counts first reach a rank."""
    reached = np.nonzero(below >= rank)[0]
    return int(reached[0]) if len(reached) else len(below) - 1


@dataclass(frozen=True)
class Frequency(Question):
    """The number of rows with each value of a column.

    Args:
        column: The column.
        values: Its values. Empty: learned from the clients, which secure aggregation and privacy do not allow.
    """

    column: str
    values: tuple[str, ...] = ()

    @property
    def undeclared(self) -> Mapping[str, str]:
        return {} if self.values else {"values": self.column}

    @property
    def cuts(self) -> Mapping[str, tuple[Any, ...]]:
        return {self.column: self.values}

    def local(self, table: Any, state: Any) -> Tree:
        return tree(counts=np.bincount(codes(table, self.column, self.values), minlength=len(self.values) + 1))

    def step(self, total: Tree, state: Any) -> Answer:
        *counts, other = array(total["counts"]).tolist()
        found = dict(zip(map(str, self.values), counts, strict=True))
        return Answer(sum(counts), parts=found, counts={**found, OTHER: other})

    def sensitivity(self, state: Any) -> float:
        return 1.0


@dataclass(frozen=True)
class ChiSquare(Question):
    r"""Pearson's test of independence, :math:`\chi^2 = \sum (O - E)^2 / E`, without Yates' correction.

    Args:
        x: A column.
        y: The other column; rows without either value are ignored.
        x_values: The values of ``x``. Empty: learned from the clients.
        y_values: The values of ``y``. Empty: learned from the clients.
    """

    x: str
    y: str
    x_values: tuple[str, ...] = ()
    y_values: tuple[str, ...] = ()

    @property
    def undeclared(self) -> Mapping[str, str]:
        fields = {"x_values": self.x, "y_values": self.y}
        return {name: column for name, column in fields.items() if not getattr(self, name)}

    @property
    def cuts(self) -> Mapping[str, tuple[Any, ...]]:
        return {self.x: self.x_values, self.y: self.y_values}

    def local(self, table: Any, state: Any) -> Tree:
        shape = len(self.x_values) + 1, len(self.y_values) + 1
        places = codes(table, self.x, self.x_values) * shape[1] + codes(table, self.y, self.y_values)
        return tree(counts=np.bincount(places, minlength=shape[0] * shape[1]).reshape(shape))

    def step(self, total: Tree, state: Any) -> Answer:
        counts = array(total["counts"])[:-1, :-1]
        rows, columns = counts.sum(1), counts.sum(0)
        n = float(counts.sum())
        if n <= 0 or (rows <= 0).any() or (columns <= 0).any():
            return Answer(n, withheld="a value has no rows, so expected counts are 0")
        expected = np.outer(rows, columns) / n
        statistic = float(((counts - expected) ** 2 / expected).sum())
        df = (len(rows) - 1) * (len(columns) - 1)
        margins = {
            **{f"{self.x}={value}": count for value, count in zip(self.x_values, rows.tolist(), strict=True)},
            **{f"{self.y}={value}": count for value, count in zip(self.y_values, columns.tolist(), strict=True)},
        }
        p = chi2_p(statistic, df) if df else math.nan
        # With one degree of freedom, the statistic and the margins reveal every cell.
        fewest = float(counts[counts > 0].min()) if df <= 1 else 0.0
        return Answer(n, {"chi2": statistic, "df": df, "p": p}, counts=margins, fewest=fewest)

    def sensitivity(self, state: Any) -> float:
        return 1.0
