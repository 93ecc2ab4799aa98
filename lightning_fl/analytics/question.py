"""The interface of a question: sums that each client computes over its rows, and the answer from the total."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_fl.types import Tree

Range = tuple[float, float]
"""The smallest and largest value of a column, from public knowledge."""


@dataclass(frozen=True)
class Answer:
    """The answer of all clients together.

    Args:
        n: Number of rows behind the answer.
        values: The answer, as plain data.
        parts: Answers about parts of the rows, such as one group.
        counts: Number of rows behind each part, or behind each set of rows that the answer distinguishes.
        fewest: Number of rows in the smallest set that the values distinguish; 0 if they distinguish none.
        withheld: Why there is no answer; empty if there is one.
    """

    n: float
    values: Mapping[str, Any] = field(default_factory=dict)
    parts: Mapping[str, Any] = field(default_factory=dict)
    counts: Mapping[str, float] = field(default_factory=dict)
    fewest: float = 0.0
    withheld: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The answer as plain data for JSON."""
        if self.withheld:
            return {"withheld": self.withheld}
        parts = {name: part.to_dict() if isinstance(part, Answer) else part for name, part in self.parts.items()}
        return _plain({"n": self.n, **self.values, **({"parts": parts} if parts else {})})


class Question(ABC):
    """A question about rows that stay with their clients; a frozen dataclass of its settings.

    In each step every client computes :meth:`local`; :meth:`step` gets the sum over all clients and returns the state
    of the next step or, at the end, the answer. A state is plain data that all parties may know.
    """

    is_private_by_itself: bool = False
    """Whether the answer is differentially private without noise on its sums."""

    @property
    def own_epsilon(self) -> tuple[float, float]:
        """Epsilon and delta of an answer that is private by itself."""
        return 0.0, 0.0

    @property
    def undeclared(self) -> Mapping[str, str]:
        """Fields of the question that have to be learned from the data, each with its column."""
        return {}

    @property
    def individual(self) -> frozenset[str]:
        """Those fields of :attr:`undeclared` that would list values of single rows, such as times or ids."""
        return frozenset()

    def declare(self, name: str, values: Sequence[Any]) -> Question:
        """The question with a field of :attr:`undeclared` filled in."""
        return replace(self, **{name: tuple(values)})  # type: ignore[type-var]

    @property
    def cuts(self) -> Mapping[str, tuple[Any, ...]]:
        """The columns by which the answer divides the rows, each with the values or edges of the parts."""
        return {}

    def check_sums(self) -> None:
        """Checks that sums alone reveal no more than the answer, as secure aggregation promises.

        Raises:
            ValueError: If they do.
        """
        return

    def start(self) -> Any:
        """The state of the first step."""
        return {}

    @abstractmethod
    def local(self, table: Any, state: Any) -> Tree:
        """A client's contribution to the sums of this step: float64 tensors by name, with shapes given by the state.

        Args:
            table: The client's rows, a pandas ``DataFrame``.
            state: The state of this step.
        """

    @abstractmethod
    def step(self, total: Tree, state: Any) -> Any:
        """The next state, or the :class:`Answer`.

        Args:
            total: The sums of all clients.
            state: The state with which they were computed.
        """

    def sensitivity(self, state: Any) -> float:
        """The largest norm of one row's contribution to the sums of this step.

        Raises:
            ValueError: If there is no bound: a range was not declared, or the question has none.
        """
        raise ValueError(
            f"{type(self).__name__} has no bound on one row's contribution to its sums, so noise can't hide a row. Ask "
            "it without differential privacy."
        )


def numbers(table: Any, *columns: str) -> np.ndarray:
    """Columns of a table as float64 ``[num_rows, num_columns]``; missing and infinite values are NaN.

    Raises:
        ValueError: If a column does not exist or is text.
    """
    found = []
    for column in columns:
        values = _column(table, column)
        if values.dtype.kind not in "iufb" and len(values) and values.notna().any():
            raise ValueError(f"The column {column!r} is text ({values.dtype}); the question needs numbers.")
        found.append(np.asarray(values.astype("float64"), dtype=np.float64))
    stacked = np.stack(found, axis=1)
    return np.where(np.isfinite(stacked), stacked, np.nan)


def complete(values: np.ndarray) -> np.ndarray:
    """The rows without a missing value."""
    rows: np.ndarray = values[~np.isnan(values).any(1)]
    return rows


def labels(table: Any, column: str) -> np.ndarray:
    """A column as strings, with None for missing values; whole numbers have no decimal point."""
    values = _column(table, column)
    found = np.full(len(values), None, dtype=object)
    for row, value in enumerate(values.tolist()):
        if value is not None and value == value:
            is_whole = isinstance(value, float) and value.is_integer()
            found[row] = str(int(value)) if is_whole else str(value)
    return found


def codes(table: Any, column: str, values: Sequence[Any]) -> np.ndarray:
    """The index of each row's label in ``values``; ``len(values)`` if it is missing or not listed."""
    place = {str(value): index for index, value in enumerate(values)}
    return np.array([place.get(label, len(values)) for label in labels(table, column)], dtype=np.int64)


def by_value(found: Sequence[str]) -> list[str]:
    """Sorted labels: numbers by value, then strings."""

    def key(label: str) -> tuple[int, float, str]:
        try:
            return 0, float(label), label
        except ValueError:
            return 1, 0.0, label

    return sorted(set(found), key=key)


def by_question(sums: Tree) -> dict[int, Tree]:
    """Groups sums by question; their names begin with the number of their question."""
    found: dict[int, Tree] = {}
    for name, value in sums.items():
        place, _, rest = name.partition("/")
        found.setdefault(int(place), {})[rest] = value
    return found


def tree(**sums: Any) -> Tree:
    """Sums as float64 tensors."""
    return {name: torch.as_tensor(np.asarray(value, dtype=np.float64).copy()) for name, value in sums.items()}


def array(tensor: Tensor) -> np.ndarray:
    """A sum as a NumPy array."""
    found: np.ndarray = tensor.cpu().numpy()
    return found


def units(values: np.ndarray, ranges: Sequence[Range | None]) -> np.ndarray:
    """Clips columns that have a range and scales them to [-1, 1]; others are unchanged."""
    if not any(ranges):
        return values
    scaled = values.copy()
    for index, bounds in enumerate(ranges):
        if bounds is not None:
            middle, half = (bounds[0] + bounds[1]) / 2, (bounds[1] - bounds[0]) / 2
            scaled[:, index] = (np.clip(values[:, index], *bounds) - middle) / half
    return scaled


def scales(ranges: Sequence[Range | None]) -> tuple[np.ndarray, np.ndarray]:
    """Middle and half width of each range, which invert :func:`units`."""
    pairs = [(0.0, 1.0) if r is None else ((r[0] + r[1]) / 2, (r[1] - r[0]) / 2) for r in ranges]
    middles, halves = np.array(pairs).T
    return middles, halves


def check_range(name: str, bounds: Range | None) -> None:
    """Refuses a range that is empty or not finite."""
    if bounds is not None and not -math.inf < bounds[0] < bounds[1] < math.inf:
        raise ValueError(f"The range {tuple(bounds)} of {name!r} is empty; expected low < high, both finite.")


def need_ranges(question: str, columns: Sequence[str], ranges: Sequence[Range | None]) -> None:
    """Raises ValueError if a column has no range, without which the scale of the noise is undefined."""
    missing = [column for column, bounds in zip(columns, ranges, strict=True) if bounds is None]
    if missing:
        raise ValueError(
            f"{question} of {', '.join(map(repr, missing))} has no declared range, so the influence of one row is "
            "unbounded. Declare the smallest and largest value from public knowledge: range=(low, high), or "
            f"--range {missing[0]}=LOW,HIGH."
        )


def _column(table: Any, column: str) -> Any:
    if column not in table.columns:
        raise ValueError(f"There is no column {column!r}; the columns are {', '.join(map(str, table.columns))}.")
    return table[column]


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return None if not math.isfinite(value) else value
    return value
