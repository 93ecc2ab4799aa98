"""Counts, means, variances and what follows from them."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lightning_fl.analytics.question import (
    Answer,
    Question,
    Range,
    array,
    check_range,
    complete,
    labels,
    need_ranges,
    numbers,
    scales,
    tree,
    units,
)
from lightning_fl.types import Tree


@dataclass(frozen=True)
class Count(Question):
    """Number of rows, or of rows that have a value in a column.

    Args:
        column: The column. None: all rows count.
    """

    column: str | None = None

    def local(self, table: Any, state: Any) -> Tree:
        if self.column is None:
            return tree(n=len(table))
        return tree(n=sum(label is not None for label in labels(table, self.column)))

    def step(self, total: Tree, state: Any) -> Answer:
        n = float(total["n"])
        return Answer(n, {"count": n})

    def sensitivity(self, state: Any) -> float:
        return 1.0


@dataclass(frozen=True)
class Mean(Question):
    r"""The mean :math:`\sum_i x_i / n` of a column.

    Args:
        column: The column; missing values are ignored.
        range: Its smallest and largest value, to which values are clipped. Required for differential privacy.
    """

    column: str
    range: Range | None = None

    def __post_init__(self) -> None:
        check_range(self.column, self.range)

    def local(self, table: Any, state: Any) -> Tree:
        values = units(complete(numbers(table, self.column)), [self.range])
        return tree(n=len(values), sum=values.sum())

    def step(self, total: Tree, state: Any) -> Answer:
        (middle,), (half,) = scales([self.range])
        n = float(total["n"])
        return Answer(n, {"mean": middle + half * float(total["sum"]) / max(n, 1.0)})

    def sensitivity(self, state: Any) -> float:
        need_ranges("Mean", [self.column], [self.range])
        return math.sqrt(2.0)


@dataclass(frozen=True)
class _Moments(Question):
    """Computes means in the first step, and sums of products of deviations in the second, which avoids cancellation."""

    @property
    @abstractmethod
    def _columns(self) -> Sequence[str]:
        """The columns whose moments are summed."""

    @property
    @abstractmethod
    def _ranges(self) -> Sequence[Range | None]:
        """The range of each; None where none is declared."""

    @abstractmethod
    def _finish(self, n: float, mean: np.ndarray, products: np.ndarray) -> Answer:
        """The answer from the number of rows, the means, and the sums of products of deviations from the means."""

    def local(self, table: Any, state: Any) -> Tree:
        values = units(complete(numbers(table, *self._columns)), self._ranges)
        if not state:
            return tree(n=len(values), sum=values.sum(0))
        distances = values - np.asarray(state["mean"])
        if all(self._ranges):
            distances = distances / 2  # back to [-1, 1], so that the products are at most 1
        return tree(products=distances.T @ distances, rest=np.zeros(0) if all(self._ranges) else distances.sum(0))

    def step(self, total: Tree, state: Any) -> Any:
        if not state:
            n = float(total["n"])
            mean = array(total["sum"]) / max(n, 1.0)
            # Noise may move the mean, and with it the deviations, out of the range.
            return {"n": n, "mean": (mean.clip(-1, 1) if all(self._ranges) else mean).tolist()}
        middles, halves = scales(self._ranges)
        n, mean, products = state["n"], np.asarray(state["mean"]), array(total["products"])
        if all(self._ranges):
            products = 4 * products
        elif n:  # corrects the rounding errors of the means
            products = products - np.outer(total["rest"], total["rest"]) / n
        return self._finish(n, middles + halves * mean, products * np.outer(halves, halves))

    def sensitivity(self, state: Any) -> float:
        need_ranges(type(self).__name__, self._columns, self._ranges)
        size = len(self._columns)
        return float(size) if state else math.sqrt(1 + size)


@dataclass(frozen=True)
class Variance(_Moments):
    r"""Mean, variance :math:`\sum_i (x_i - \bar x)^2 / (n - 1)` and standard deviation of a column.

    Args:
        column: The column; missing values are ignored.
        range: Its smallest and largest value, to which values are clipped. Required for differential privacy.
        ddof: Delta degrees of freedom: the divisor is n - ddof. Default 1.
    """

    column: str
    range: Range | None = None
    ddof: int = 1

    def __post_init__(self) -> None:
        check_range(self.column, self.range)

    @property
    def _columns(self) -> Sequence[str]:
        return (self.column,)

    @property
    def _ranges(self) -> Sequence[Range | None]:
        return (self.range,)

    def _finish(self, n: float, mean: np.ndarray, products: np.ndarray) -> Answer:
        variance = max(float(products[0, 0]), 0.0) / (n - self.ddof) if n > self.ddof else math.nan
        return Answer(n, {"mean": float(mean[0]), "variance": variance, "std": math.sqrt(variance)})


@dataclass(frozen=True)
class Correlation(_Moments):
    r"""Pearson's correlation of two columns, with the p-value of the hypothesis of no correlation.

    Args:
        x: A column; rows without either value are ignored.
        y: The other column.
        ranges: The range of each. Required for differential privacy.
    """

    x: str
    y: str
    ranges: tuple[Range | None, Range | None] = (None, None)

    def __post_init__(self) -> None:
        for column, bounds in zip(self._columns, self.ranges, strict=True):
            check_range(column, bounds)

    @property
    def _columns(self) -> Sequence[str]:
        return self.x, self.y

    @property
    def _ranges(self) -> Sequence[Range | None]:
        return self.ranges

    def _finish(self, n: float, mean: np.ndarray, products: np.ndarray) -> Answer:
        spread = math.sqrt(max(products[0, 0], 0.0) * max(products[1, 1], 0.0))
        r = float(np.clip(products[0, 1] / spread, -1, 1)) if spread else math.nan
        p = math.nan
        if n > 2 and abs(r) < 1:
            p = student_p(r * math.sqrt((n - 2) / (1 - r * r)), n - 2)
        return Answer(n, {"r": r, "p": p})


@dataclass(frozen=True)
class PCA(_Moments):
    """Principal component analysis: the directions in which rows differ most.

    Args:
        columns: Two or more columns; rows with a missing value are ignored.
        components: Number of components. Default 3.
        standardise: Whether to divide each column by its standard deviation. Default True.
        ranges: The range of each column. Required for differential privacy.

    Raises:
        ValueError: If there are fewer than two columns, or ``components`` or ``ranges`` does not fit them.
    """

    columns: tuple[str, ...]
    components: int = 3
    standardise: bool = True
    ranges: tuple[Range | None, ...] = ()

    def __post_init__(self) -> None:
        if len(self.columns) < 2 or (self.ranges and len(self.ranges) != len(self.columns)):
            raise ValueError(f"PCA got {len(self.columns)} columns and {len(self.ranges)} ranges; expected 2 or more.")
        if not 1 <= self.components <= len(self.columns):
            raise ValueError(f"components={self.components} must lie between 1 and {len(self.columns)}.")
        for column, bounds in zip(self._columns, self._ranges, strict=True):
            check_range(column, bounds)

    @property
    def _columns(self) -> Sequence[str]:
        return self.columns

    @property
    def _ranges(self) -> Sequence[Range | None]:
        return self.ranges or (None,) * len(self.columns)

    def _finish(self, n: float, mean: np.ndarray, products: np.ndarray) -> Answer:
        if n < 2:
            return Answer(n, withheld="fewer than 2 rows are complete")
        covariance = products / (n - 1)
        if self.standardise:
            std = np.sqrt(np.diag(covariance).clip(0))
            std = np.where(std > 0, std, 1.0)
            covariance = covariance / np.outer(std, std)
        values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
        values, vectors = values[::-1].clip(0), vectors[:, ::-1].T[: self.components]
        # A direction is defined up to its sign: make the largest entry positive.
        vectors = vectors * np.sign(vectors[np.arange(len(vectors)), np.abs(vectors).argmax(1)])[:, None]
        ratio = values / (values.sum() or 1.0)
        return Answer(n, {"explained": ratio[: self.components].tolist(), "components": vectors.tolist()})


def student_p(t: float, df: float) -> float:
    """The two-sided p-value of Student's t."""
    return float(2 * statistics().t.sf(abs(t), df))


def chi2_p(value: float, df: float) -> float:
    """The p-value of a chi-squared statistic."""
    return float(statistics().chi2.sf(value, df))


def statistics() -> Any:
    """SciPy's distributions.

    Raises:
        ImportError: If SciPy is not installed.
    """
    try:
        from scipy import stats
    except ImportError as error:
        raise ImportError('p-values need SciPy: pip install "lightning-fl[data]"') from error
    return stats
