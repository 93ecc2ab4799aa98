"""A question asked separately for each group of rows, and the t-test of two groups."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lightning_fl.analytics.counts import OTHER
from lightning_fl.analytics.moments import Variance, student_p
from lightning_fl.analytics.question import Answer, Question, Range, check_range, codes
from lightning_fl.types import Tree


@dataclass(frozen=True)
class By(Question):
    """A question asked separately for the rows of each value of a column.

    Args:
        question: The question.
        column: The column that names the group of a row.
        values: Its values. Empty: learned from the clients, which secure aggregation and privacy do not allow.
    """

    question: Question
    column: str
    values: tuple[str, ...] = ()

    @property
    def undeclared(self) -> Mapping[str, str]:
        own = {} if self.values else {"values": self.column}
        return {**own, **{f"question.{name}": column for name, column in self.question.undeclared.items()}}

    @property
    def individual(self) -> frozenset[str]:
        return frozenset(f"question.{name}" for name in self.question.individual)

    def declare(self, name: str, values: Sequence[Any]) -> Question:
        if name.startswith("question."):
            return replace(self, question=self.question.declare(name.removeprefix("question."), values))
        return super().declare(name, values)

    def check_sums(self) -> None:
        self.question.check_sums()

    @property
    def cuts(self) -> Mapping[str, tuple[Any, ...]]:
        return {self.column: self.values, **self.question.cuts}

    def start(self) -> Any:
        # One more for the rows of no group, which are not shown but whose number must not be too small.
        return {"states": [self.question.start() for _ in (*self.values, OTHER)]}

    def local(self, table: Any, state: Any) -> Tree:
        places = codes(table, self.column, self.values)
        sums: Tree = {}
        for place, inner in enumerate(state["states"]):
            if not isinstance(inner, Answer):
                found = self.question.local(table[places == place], inner)
                sums.update({f"{place}/{name}": value for name, value in found.items()})
        return sums

    def step(self, total: Tree, state: Any) -> Any:
        states = [
            inner if isinstance(inner, Answer) else self.question.step(_under(total, f"{place}/"), inner)
            for place, inner in enumerate(state["states"])
        ]
        if not all(isinstance(inner, Answer) for inner in states):
            return {"states": states}
        parts = dict(zip(map(str, self.values), states[:-1], strict=True))
        counts = {name: part.n for name, part in parts.items()}
        return Answer(sum(counts.values()), parts=parts, counts={**counts, OTHER: states[-1].n})

    def sensitivity(self, state: Any) -> float:
        # A row is in one group.
        going = [inner for inner in state["states"] if not isinstance(inner, Answer)]
        return max(self.question.sensitivity(inner) for inner in going)


def _under(total: Tree, prefix: str) -> Tree:
    return {name.removeprefix(prefix): value for name, value in total.items() if name.startswith(prefix)}


@dataclass(frozen=True)
class TTest(Question):
    r"""The t-test of equal means in two groups.

    .. math:: t = \frac{\bar x_1 - \bar x_2}{\sqrt{s_1^2 / n_1 + s_2^2 / n_2}}

    with Welch's degrees of freedom, or with the pooled variance.

    Args:
        column: The column whose means are compared.
        by: The column that names the group of a row.
        groups: Its two values. Empty: learned from the clients.
        equal_var: Whether to pool the variances (Student's test). Default False: Welch's test.
        range: The smallest and largest value. Required for differential privacy.
    """

    column: str
    by: str
    groups: tuple[str, ...] = ()
    equal_var: bool = False
    range: Range | None = None

    def __post_init__(self) -> None:
        check_range(self.column, self.range)
        if self.groups and len(self.groups) != 2:
            raise ValueError(
                f"A t-test compares two groups; {self.by!r} has {len(self.groups)}. Name two with groups=, or --values."
            )

    @property
    def _strata(self) -> By:
        return By(Variance(self.column, self.range), self.by, self.groups)

    @property
    def undeclared(self) -> Mapping[str, str]:
        return {} if self.groups else {"groups": self.by}

    @property
    def cuts(self) -> Mapping[str, tuple[Any, ...]]:
        return {self.by: self.groups}

    def start(self) -> Any:
        return self._strata.start()

    def local(self, table: Any, state: Any) -> Tree:
        return self._strata.local(table, state)

    def sensitivity(self, state: Any) -> float:
        return self._strata.sensitivity(state)

    def step(self, total: Tree, state: Any) -> Any:
        found = self._strata.step(total, state)
        if not isinstance(found, Answer):
            return found
        first, second = found.parts.values()
        counts = found.counts  # including the rows of neither group, which the mean of all rows would reveal
        n = first.n + second.n
        variances = first.values["variance"], second.values["variance"]
        if min(first.n, second.n) < 2 or not sum(variances) > 0:
            return Answer(n, withheld="a group has fewer than 2 values, or all values are equal", counts=counts)
        if self.equal_var:
            df = n - 2
            pooled = ((first.n - 1) * variances[0] + (second.n - 1) * variances[1]) / df
            squared = pooled * (1 / first.n + 1 / second.n)
        else:
            a, b = variances[0] / first.n, variances[1] / second.n
            squared = a + b
            df = squared**2 / (a**2 / (first.n - 1) + b**2 / (second.n - 1))
        means = first.values["mean"], second.values["mean"]
        t = (means[0] - means[1]) / math.sqrt(squared)
        values = {"t": t, "df": df, "p": student_p(t, df), "means": dict(zip(found.parts, means, strict=True))}
        return Answer(n, values, counts=counts)
