"""Survival analysis of times until an event, with censoring: Kaplan-Meier, log-rank test, Cox regression."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np

from lightning_fl.analytics.counts import OTHER
from lightning_fl.analytics.moments import chi2_p
from lightning_fl.analytics.question import Answer, Question, array, codes, numbers, tree
from lightning_fl.types import Tree

MAX_ITERATIONS = 50
TOLERANCE = 1e-10


def _check_grid(grid: Sequence[float]) -> None:
    values = [float(time) for time in grid]
    if any(b <= a for a, b in pairwise(values)):
        raise ValueError(f"The times of the grid must increase; found {values[:5]}...")


def _times(
    table: Any, time: str, status: str, event: float, grid: Sequence[float] | np.ndarray
) -> tuple[np.ndarray, ...]:
    """The index of each row's time in the grid, whether it ended in an event, and which rows have both values."""
    values = numbers(table, time, status)
    known = ~np.isnan(values).any(1)
    places = np.searchsorted(np.asarray(grid, dtype=np.float64), values[known, 0], side="left")
    return places, values[known, 1] == event, known


class _OnGrid(Question):
    """A question about times on a grid; if none is declared, the grid is learned from the clients' times."""

    @property
    def individual(self) -> frozenset[str]:
        return frozenset({"grid", "learned_grid"})

    def declare(self, name: str, values: Sequence[Any]) -> Question:
        return super().declare(name, sorted(map(float, values)) if name in self.individual else values)


def _fewest(events: float, n: float) -> float:
    """The smaller of the numbers of rows with and without an event, both of which an answer reveals."""
    return min((count for count in (events, n - events) if count > 0), default=0.0)


def _counted(places: np.ndarray, events: np.ndarray, size: int) -> np.ndarray:
    """Events and censorings at each time, ``[2, size]``; rows after the last time are at risk but not counted."""
    return np.stack([np.bincount(places[chosen], minlength=size)[:size] for chosen in (events, ~events)])


@dataclass(frozen=True)
class KaplanMeier(_OnGrid):
    r"""The Kaplan-Meier estimate: the share of rows without an event until each time, with Greenwood's standard error.

    .. math::
        S(t) = \prod_{t_j \le t} \Bigl(1 - \frac{d_j}{n_j}\Bigr), \qquad
        \mathrm{se}^2 = S(t)^2 \sum_{t_j \le t} \frac{d_j}{n_j (n_j - d_j)}

    Args:
        time: The column of times.
        status: The column that says whether a time ended in an event or was censored.
        event: The status of an event; all others are censored. Default 1.
        grid: Increasing times at which events and censorings are counted; a time in between counts at the next one.
            Empty: all times of the clients, which secure aggregation and privacy do not allow. The answer contains the
            curve only if a grid was declared and no step of the curve is due to only a few rows.
        at: Times at which to return the share. The answer is withheld if only a few rows end between two of them.

    Reference:
        Kaplan and Meier, "Nonparametric Estimation from Incomplete Observations", JASA 1958.
    """

    time: str
    status: str
    event: float = 1
    grid: tuple[float, ...] = ()
    at: tuple[float, ...] = ()
    learned_grid: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        _check_grid(self.grid)

    @property
    def _grid(self) -> np.ndarray:
        return np.array(self.grid or self.learned_grid, dtype=np.float64)

    @property
    def undeclared(self) -> Mapping[str, str]:
        return {} if len(self._grid) else {"learned_grid": self.time}

    @property
    def cuts(self) -> Mapping[str, tuple[Any, ...]]:
        return {self.time: tuple(map(float, self.at))} if self.at else {}

    def local(self, table: Any, state: Any) -> Tree:
        places, events, _ = _times(table, self.time, self.status, self.event, self._grid)
        return tree(counts=_counted(places, events, len(self._grid)), later=(places == len(self._grid)).sum())

    def step(self, total: Tree, state: Any) -> Answer:
        (events, censored), later = array(total["counts"]), float(total["later"])
        grid, n = self._grid, float(events.sum() + censored.sum() + later)
        survival, error = _product_limit(events, censored, later)
        values: dict[str, Any] = {"events": float(events.sum()), "median": _first_below(grid, survival, 0.5)}
        for time in self.at:
            place = int(np.searchsorted(grid, time, side="right")) - 1
            share, se = (1.0, 0.0) if place < 0 else (float(survival[place]), float(error[place]))
            values[f"S({time:g})"] = {"share": share, "se": se}
        leaving = events + censored
        # The shares at two times reveal the number of events between them.
        between = np.zeros(len(self.at) + 1)
        np.add.at(between, np.searchsorted(np.sort(self.at), grid, side="left"), leaving)
        between[-1] += later
        fewest = min(float(between[between > 0].min(initial=n)), _fewest(float(events.sum()), n))
        if not self.grid:
            return Answer(n, values, fewest=fewest)
        curve = {"time": grid.tolist(), "share": survival.tolist(), "se": error.tolist()}
        return Answer(n, values, {"curve": curve}, {"curve": float(leaving[leaving > 0].min(initial=n))}, fewest)

    def sensitivity(self, state: Any) -> float:
        return 1.0


def _product_limit(events: np.ndarray, censored: np.ndarray, later: float) -> tuple[np.ndarray, np.ndarray]:
    leaving = events + censored
    at_risk = leaving[::-1].cumsum()[::-1] + later
    # Noise may move counts below zero or above the rows at risk.
    rate = np.divide(events, at_risk, out=np.zeros_like(events), where=at_risk > 0).clip(0, 1)
    survival = np.cumprod(1 - rate)
    terms = np.divide(events, at_risk * (at_risk - events), out=np.zeros_like(events), where=at_risk > events)
    return survival, survival * np.sqrt(np.cumsum(terms.clip(0)))


def _first_below(grid: np.ndarray, survival: np.ndarray, share: float) -> float:
    below = np.nonzero(survival <= share + 1e-12)[0]
    return float(grid[below[0]]) if len(below) else math.inf


@dataclass(frozen=True)
class LogRank(_OnGrid):
    r"""The log-rank test of equal survival in groups.

    :math:`\chi^2 = (O - E)^T V^{-1} (O - E)` over all groups but one, with the hypergeometric variance.

    Args:
        time: The column of times.
        status: The column that says whether a time ended in an event or was censored.
        by: The column that names the group of a row.
        event: The status of an event. Default 1.
        groups: The values of ``by``. Empty: learned from the clients.
        grid: Times as for :class:`KaplanMeier`.

    Reference:
        Mantel, "Evaluation of Survival Data and Two New Rank Order Statistics", 1966.
    """

    time: str
    status: str
    by: str
    event: float = 1
    groups: tuple[str, ...] = ()
    grid: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        _check_grid(self.grid)

    @property
    def undeclared(self) -> Mapping[str, str]:
        fields = {"groups": self.by, "grid": self.time}
        return {name: column for name, column in fields.items() if not getattr(self, name)}

    @property
    def cuts(self) -> Mapping[str, tuple[Any, ...]]:
        return {self.by: self.groups}

    def local(self, table: Any, state: Any) -> Tree:
        places, events, known = _times(table, self.time, self.status, self.event, self.grid)
        group = codes(table[known], self.by, self.groups)
        size = len(self.grid)
        chosen = [group == index for index in range(len(self.groups))]
        counts = [_counted(places[rows], events[rows], size) for rows in chosen]
        later = [(places[rows] == size).sum() for rows in chosen]
        other = (group == len(self.groups)).sum()
        return tree(counts=np.array(counts).reshape(len(chosen), 2, size), later=later, other=other)

    def step(self, total: Tree, state: Any) -> Answer:
        counts, later = array(total["counts"]), array(total["later"])
        events = counts[:, 0]
        rows = counts.sum((1, 2)) + later
        at_risk = counts.sum(1)[:, ::-1].cumsum(1)[:, ::-1] + later[:, None]
        all_events, everybody = events.sum(0), at_risk.sum(0)
        share = np.divide(at_risk, everybody, out=np.zeros_like(at_risk), where=everybody > 0)
        observed, expected = events.sum(1), (share * all_events).sum(1)
        spread = np.divide(
            all_events * (everybody - all_events), everybody - 1, out=np.zeros_like(everybody), where=everybody > 1
        )
        variance = np.diag((share * spread).sum(1)) - (share * spread) @ share.T
        difference, named = (observed - expected)[:-1], dict(zip(map(str, self.groups), rows.tolist(), strict=True))
        # The events of all rows minus those of the groups would reveal those of rows in no group.
        named_and_others = {**named, OTHER: float(total["other"])}
        df = len(self.groups) - 1
        if df < 1 or np.linalg.matrix_rank(variance[:-1, :-1]) < df:
            return Answer(float(rows.sum()), withheld="there are no events to compare, or a group is empty")
        statistic = float(difference @ np.linalg.solve(variance[:-1, :-1], difference))
        values = {
            "chi2": statistic,
            "df": df,
            "p": chi2_p(statistic, df),
            "observed": dict(zip(named, observed.tolist(), strict=True)),
            "expected": dict(zip(named, expected.tolist(), strict=True)),
        }
        fewest = min(_fewest(own, n) or n for own, n in zip(observed.tolist(), rows.tolist(), strict=True))
        return Answer(float(rows.sum()), values, counts=named_and_others, fewest=fewest)

    def sensitivity(self, state: Any) -> float:
        return 1.0


@dataclass(frozen=True)
class Cox(_OnGrid):
    r"""Cox's proportional hazards model: the coefficients that maximise the partial likelihood, by Newton's method.

    Each step sums :math:`\sum e^{x \beta}` and its first two derivatives, over the rows at risk at each time and over
    the events at that time, so the answer is that of the pooled rows.

    Args:
        time: The column of times.
        status: The column that says whether a time ended in an event or was censored.
        covariates: The columns of :math:`x`; rows with a missing value are ignored.
        ties: The treatment of ties, ``"efron"`` or ``"breslow"``. Default ``"efron"``.
        event: The status of an event. Default 1.
        grid: Times as for :class:`KaplanMeier`.

    Reference:
        Cox, "Regression Models and Life-Tables", JRSS B 1972.
    """

    time: str
    status: str
    covariates: tuple[str, ...]
    ties: Literal["efron", "breslow"] = "efron"
    event: float = 1
    grid: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        _check_grid(self.grid)
        if self.ties not in ("efron", "breslow") or not self.covariates:
            raise ValueError(
                f"Cox got ties={self.ties!r} and {len(self.covariates)} covariates; expected 'efron' or 'breslow', and "
                "at least one column."
            )

    @property
    def undeclared(self) -> Mapping[str, str]:
        return {} if self.grid else {"grid": self.time}

    def start(self) -> Any:
        return {"beta": [0.0] * len(self.covariates), "centre": None, "iteration": 0}

    def local(self, table: Any, state: Any) -> Tree:
        places, events, known = _times(table, self.time, self.status, self.event, self.grid)
        x = numbers(table, *self.covariates)[known]
        full = ~np.isnan(x).any(1)
        x, places, events = x[full], places[full], events[full]
        if state["centre"] is None:
            return tree(n=len(x), sum=x.sum(0), events=events.sum(), other=len(full) - len(x))
        # Centred, so that the exponents are small; the coefficients do not depend on it.
        x = x - np.asarray(state["centre"])
        size, width = len(self.grid) + 1, len(self.covariates)
        weight = np.exp(x @ np.asarray(state["beta"]))
        ones, pairs = np.ones((len(x), 1)), (x[:, :, None] * x[:, None, :]).reshape(len(x), width * width)
        rows = weight[:, None] * np.concatenate([ones, x, pairs], axis=1)
        sums, of_events = np.zeros((size, rows.shape[1])), np.zeros((size, rows.shape[1]))
        np.add.at(sums, places, rows)
        np.add.at(of_events, places[events], rows[events])
        x_of_events = np.zeros((size, width + 1))
        np.add.at(x_of_events, places[events], np.concatenate([ones, x], axis=1)[events])
        return tree(sums=sums, of_events=of_events, x_of_events=x_of_events)

    def step(self, total: Tree, state: Any) -> Any:
        if state["centre"] is None:
            n, events = float(total["n"]), float(total["events"])
            if not events:
                return Answer(n, withheld="there are no events")
            return {
                **state,
                "n": n,
                "events": events,
                "other": float(total["other"]),
                "centre": (array(total["sum"]) / n).tolist(),
            }
        beta, width = np.asarray(state["beta"]), len(self.covariates)
        gradient, information = np.zeros(width), np.zeros((width, width))
        at_risk = array(total["sums"])[::-1].cumsum(0)[::-1]
        # Rows after the last time of the grid are at risk and have no event that counts.
        for risk, tied, (num_events, *x) in zip(
            at_risk[:-1], array(total["of_events"])[:-1], array(total["x_of_events"])[:-1], strict=True
        ):
            count = round(num_events)
            gradient += x
            for number in range(count):
                left = risk - number / count * tied if self.ties == "efron" else risk
                mean = left[1 : width + 1] / left[0]
                gradient -= mean
                information += left[width + 1 :].reshape(width, width) / left[0] - np.outer(mean, mean)
        n = state["n"]
        if np.linalg.matrix_rank(information) < width:
            return Answer(n, withheld="the covariates are constant or linearly dependent; leave some out")
        change = np.linalg.solve(information, gradient)
        if np.abs(change).max() < TOLERANCE:
            return self._answer(n, state, beta + change, information)
        if state["iteration"] == MAX_ITERATIONS or not np.isfinite(change).all():
            return Answer(
                n, withheld=f"no maximum was found in {MAX_ITERATIONS} steps; a covariate may predict events perfectly"
            )
        return {**state, "beta": (beta + change).tolist(), "iteration": state["iteration"] + 1}

    def _answer(self, n: float, state: Any, beta: np.ndarray, information: np.ndarray) -> Answer:
        errors = np.sqrt(np.diag(np.linalg.inv(information)))
        values: dict[str, Any] = {}
        for column, coefficient, error in zip(self.covariates, beta.tolist(), errors.tolist(), strict=True):
            p = chi2_p((coefficient / error) ** 2, 1)
            values[column] = {"coef": coefficient, "se": error, "hazard ratio": math.exp(coefficient), "p": p}
        # The events of all rows minus these would reveal those of rows with a missing covariate.
        events = state["events"]
        counts = {"events": events, OTHER: state["other"]}
        return Answer(n, values, {"events": events}, counts, _fewest(events, n))
