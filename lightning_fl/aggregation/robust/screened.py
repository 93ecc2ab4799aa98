"""Checks that filter updates before the rest are aggregated."""

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
    """Decides which updates are accepted."""

    measures: ClassVar[bool] = False
    """Whether it evaluates each update separately with :meth:`measure`, on data of the server."""

    def measure(self, update: Update, ctx: RoundContext) -> float:
        """The measurement of one update; :meth:`passes` gets all of them as ``gram.measured[self]``, ``[n]``."""
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
        z: The threshold :math:`z`, in standard deviations, estimated from the median deviation. Default 3.

    Raises:
        ValueError: If ``z`` is not positive.
    """

    z: float = 3.0

    def __post_init__(self) -> None:
        check_z(self.z)

    def passes(self, gram: Gram, ctx: RoundContext) -> Tensor:
        return scores(gram.norms).abs() <= self.z


@dataclass(frozen=True)
class CosineCheck(Check):
    """Leaves out updates whose direction differs from the sum of the others, by their cosine to it.

    Args:
        z: The threshold, in standard deviations below the median cosine, as for :class:`NormCheck`. Default 3.

    Raises:
        ValueError: If ``z`` is not positive.
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
    """Checks that a threshold is positive.

    Raises:
        ValueError: If it is not.
    """
    if not z > 0:
        raise ValueError(f"z={z} must be positive; it is the largest accepted deviation, in standard deviations.")


def scores(values: Tensor) -> Tensor:
    """The distance of values from their median in standard deviations, estimated robustly, ``[n]``."""
    middle = torch.quantile(values, 0.5)
    spread = 1.4826 * torch.quantile((values - middle).abs(), 0.5)
    # If most values are equal up to rounding, rounding must not mark any as an outlier.
    return (values - middle) / spread.clamp(min=1e-6 * max(float(middle.abs()), 1e-12))


@dataclass(frozen=True)
class Screened(RowAggregator):
    """Aggregates the updates that pass all checks; the others are left out.

    Args:
        inner: The robust rule that aggregates them, with its own ``num_attackers``. Default None: their mean.
        checks: The checks. Default None: :class:`NormCheck` and :class:`CosineCheck`.
        num_attackers: How many clients of a round may be attackers: a count, or a share of the cohort. Default 0.2.
        before: Pre-aggregators, which mix the updates first; not with checks that evaluate updates one by one.

    Raises:
        ValueError: If ``checks`` is empty, ``inner`` is not a robust rule or has pre-aggregators, or ``before`` is
            given with a check that evaluates updates one by one.
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
                f"before={self.before!r} mixes clients, but a check evaluates each client's model. Leave before out."
            )
        if self.inner is not None and (not isinstance(self.inner, RowAggregator) or self.inner.before):
            raise ValueError(
                f"inner={self.inner!r} must be a robust rule without pre-aggregators, such as fl.aggregation.Median(); "
                "give those to Screened(before=...)."
            )
        if isinstance(self.inner, FoolsGold) and self.inner.memory:
            raise ValueError(
                "inner=FoolsGold() would also sum the updates of clients that the checks left out. Set memory=False."
            )

    @property
    def _checks(self) -> Sequence[Check]:
        return (NormCheck(), CosineCheck()) if self.checks is None else self.checks

    @property
    def why(self) -> str:  # type: ignore[override]
        """The reason for leaving out a client."""
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

    @property
    def shortens(self) -> bool:  # type: ignore[override]
        return self.inner is not None and self.inner.shortens

    def check(self, algorithm: Algorithm) -> None:
        if self.inner is not None:
            self.inner.check(algorithm)
        super().check(algorithm)

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
            # No update is accepted: the model is unchanged.
            return torch.zeros(1, len(gram), dtype=torch.float64)
        if self.inner is None:
            return mean_of(chosen, len(gram))
        kept = selection(chosen, gram.num_updates)
        own = self.inner.matrix(gram.mix(kept), self._left(num_attackers, len(chosen)), ctx)
        return gram.with_beside(kept) if own is None else own @ gram.with_beside(kept)

    def combine(self, block: Tensor, num_attackers: int) -> Tensor:
        return block[0] if self.inner is None else self.inner.combine(block, self._left(num_attackers, len(block)))

    def _left(self, num_attackers: int, num_rows: int) -> int:
        """The number of attackers that the inner rule can tolerate among the rows that passed."""
        assert self.inner is not None
        while num_attackers and num_rows < self.inner.min_rows(num_attackers):
            num_attackers -= 1
        return num_attackers
