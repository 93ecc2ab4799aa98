"""Checks that leave updates out before the others are aggregated."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_fl.aggregation.context import RoundContext
from lightning_fl.aggregation.robust.foolsgold import FoolsGold
from lightning_fl.aggregation.robust.gram import Gram, mean_of, selection
from lightning_fl.aggregation.robust.rows import RoundRows, Rows
from lightning_fl.aggregation.robust.rule import PreAggregator, RowAggregator
from lightning_fl.algorithms import Algorithm
from lightning_fl.tree import Flat
from lightning_fl.types import ClientId, State, Update


class Check(ABC):
    """Decides which updates are sound."""

    measures: ClassVar[bool] = False
    """Whether it looks at each update by itself, by :meth:`measure`, with data of the server."""

    def measure(self, update: Update, ctx: RoundContext) -> float:
        """What it finds in one update; :meth:`passes` gets that of all as ``gram.measured[self]``, ``[n]``."""
        raise NotImplementedError

    @abstractmethod
    def passes(self, gram: Gram, ctx: RoundContext) -> Tensor:
        """Which rows pass, bool ``[n]``."""


@dataclass(frozen=True)
class NormCheck(Check):
    r"""Leaves out updates that are much longer or shorter than the others.

    .. math::
        \frac{|\, \lVert u_i \rVert - m \,|}{1.4826 \operatorname{median}_j |\, \lVert u_j \rVert - m \,|} > z,
        \qquad m = \operatorname{median}_j \lVert u_j \rVert

    Args:
        z: How many standard deviations, which the median of the deviations estimates. Default 3.
    """

    z: float = 3.0

    def __post_init__(self) -> None:
        check_z(self.z)

    def passes(self, gram: Gram, ctx: RoundContext) -> Tensor:
        return scores(gram.norms).abs() <= self.z


@dataclass(frozen=True)
class CosineCheck(Check):
    """Leaves out updates that point elsewhere than the sum of the others, by their cosine to it.

    Args:
        z: How many standard deviations below the median cosine, as for :class:`NormCheck`. Default 3.
    """

    z: float = 3.0

    def __post_init__(self) -> None:
        check_z(self.z)

    def passes(self, gram: Gram, ctx: RoundContext) -> Tensor:
        products, norms = gram.products, gram.norms
        own = norms.square()
        along = products.sum(1) - own
        others = (products.sum() - 2 * products.sum(1) + own).clamp(min=0).sqrt()
        length = norms * others
        return scores(torch.where(length > 0, along / length, 0.0)) >= -self.z


def check_z(z: float) -> None:
    """Makes sure that a threshold is one.

    Raises:
        ValueError: If it is not positive.
    """
    if not z > 0:
        raise ValueError(f"z={z} must be positive: how many standard deviations an update may lie away.")


def scores(values: Tensor) -> Tensor:
    """How many standard deviations values lie from their median, which outliers do not move, ``[n]``."""
    middle = torch.quantile(values, 0.5)
    spread = 1.4826 * torch.quantile((values - middle).abs(), 0.5)
    # Where most are the same to rounding, rounding is no reason.
    return (values - middle) / spread.clamp(min=1e-6 * max(float(middle.abs()), 1e-12))


@dataclass(frozen=True)
class Screened(RowAggregator):
    """Aggregates the updates that pass all checks; the others are left out.

    Args:
        inner: The robust rule that aggregates them, with its own ``num_attackers``. None: their mean.
        checks: The checks. None: of the norm and of the cosine.
        num_attackers: How many clients of a round may be attackers: a count, or a share of the cohort. Default 0.2.

    Raises:
        ValueError: If there is no check, or ``inner`` is no robust rule.
    """

    inner: RowAggregator | None = None
    checks: Sequence[Check] | None = None
    num_attackers: int | float = 0.2
    before: Sequence[PreAggregator] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.checks is not None and (not self.checks or not all(isinstance(check, Check) for check in self.checks)):
            raise ValueError(f"checks={self.checks!r} must be checks, such as [fl.aggregation.NormCheck()].")
        if self.needs_server and self.before:
            raise ValueError(
                f"before={self.before!r} mixes clients, but a check looks at the model of each. Leave before out."
            )
        if self.inner is not None and (not isinstance(self.inner, RowAggregator) or self.inner.before):
            raise ValueError(
                f"inner={self.inner!r} must be a robust rule without pre-aggregators, such as fl.aggregation.Median(); "
                "give those to Screened(before=...)."
            )
        if isinstance(self.inner, FoolsGold) and self.inner.memory:
            raise ValueError(
                "inner=FoolsGold() would sum up the updates of clients that checks leave out too. Give it memory=False."
            )

    @property
    def _checks(self) -> Sequence[Check]:
        return (NormCheck(), CosineCheck()) if self.checks is None else self.checks

    @property
    def why(self) -> str:  # type: ignore[override]
        """Why a client is left out."""
        names = " or ".join(type(check).__name__ for check in self._checks)
        return f"did not pass {names}" + (f", or left out by {type(self.inner).__name__}" if self.inner else "")

    @property
    def server_data(self) -> Any:
        return None if self.inner is None else self.inner.server_data

    @property
    def needs_server(self) -> bool:
        return self.server_data is not None or any(check.measures for check in self._checks)

    def measure(self, rows: Rows, ctx: RoundContext) -> Mapping[Any, Sequence[float]]:
        found: dict[Any, list[float]] = {check: [] for check in self._checks if check.measures}
        for update in rows.updates() if found else ():
            for check, values in found.items():
                values.append(check.measure(update, ctx))
        return found

    def check(self, algorithm: Algorithm) -> None:
        if self.inner is not None:
            self.inner.check(algorithm)

    def beside(self, rows: Rows, clients: Sequence[ClientId], ctx: RoundContext) -> Flat:
        return {} if self.inner is None else self.inner.beside(rows, clients, ctx)

    def keep(self, rows: RoundRows, flat: Flat, clients: Sequence[ClientId], ctx: RoundContext) -> State:
        return {} if self.inner is None else self.inner.keep(rows, flat, clients, ctx)

    def reasons(self, gram: Gram, ctx: RoundContext) -> Mapping[ClientId, str]:
        failed: dict[ClientId, list[str]] = {}
        for check in self._checks:
            for place in (~check.passes(gram.updates, ctx)).nonzero()[:, 0].tolist():
                failed.setdefault(gram.clients[place], []).append(type(check).__name__)
        return {client: f"did not pass {' and '.join(names)}" for client, names in failed.items()}

    def matrix(self, gram: Gram, num_attackers: int, ctx: RoundContext) -> Tensor:
        passed = torch.ones(gram.num_updates, dtype=torch.bool)
        for check in self._checks:
            passed &= check.passes(gram.updates, ctx)
        chosen = passed.nonzero()[:, 0]
        if not len(chosen):
            # Nothing is sound: the model does not move.
            return torch.zeros(1, len(gram), dtype=torch.float64)
        if self.inner is None:
            return mean_of(chosen, len(gram))
        kept = selection(chosen, gram.num_updates)
        own = self.inner.matrix(gram.mix(kept), self._left(num_attackers, len(chosen)), ctx)
        return gram.with_beside(kept) if own is None else own @ gram.with_beside(kept)

    def combine(self, block: Tensor, num_attackers: int) -> Tensor:
        return block[0] if self.inner is None else self.inner.combine(block, self._left(num_attackers, len(block)))

    def _left(self, num_attackers: int, num_rows: int) -> int:
        """How many attackers the inner rule can withstand among the rows that have passed."""
        assert self.inner is not None
        while num_attackers and num_rows < self.inner.min_rows(num_attackers):
            num_attackers -= 1
        return num_attackers
