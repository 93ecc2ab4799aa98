"""The geometric median, exactly or by a few steps (RFA)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_fl.aggregation.context import RoundContext
from lightning_fl.aggregation.robust.gram import Gram
from lightning_fl.aggregation.robust.rule import GramRule, PreAggregator


@dataclass(frozen=True)
class GeometricMedian(GramRule):
    r"""The geometric median, the point with the smallest sum of distances to the updates.

    .. math::
        x \leftarrow x + \arg\min_z \sum_i \lVert u_i - z \rVert

    It is computed to convergence by Weiszfeld's iteration from the mean. Each update is tested first for being the
    median itself, since the iteration converges slowly near an update. With ``iterations`` it is RFA, a fixed number of
    smoothed steps, as ByzFL does: three of them can give 3.7879 where the median is 4. Weights are ignored.

    Args:
        num_attackers: How many clients of a round may be attackers: a count, or a share of the cohort. Default 0.2.
        iterations: Number of Weiszfeld steps. Default None: until convergence.
        smoothing: Lower bound of the distances in RFA's steps. Default 1e-6.
        before: Pre-aggregators, which mix the updates first.

    Raises:
        ValueError: If ``iterations`` or ``smoothing`` is not positive; before training, if a round has no more than
            twice as many clients as attackers.

    Reference:
        Pillutla et al., "Robust Aggregation for Federated Learning", IEEE Transactions on Signal Processing 2022.
    """

    num_attackers: int | float = 0.2
    iterations: int | None = None
    smoothing: float = 1e-6
    before: Sequence[PreAggregator] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.iterations is not None and self.iterations < 1:
            raise ValueError(f"iterations={self.iterations} must be at least 1, or None for the exact median.")
        if not self.smoothing > 0:
            raise ValueError(f"smoothing={self.smoothing} must be positive.")

    def matrix(self, gram: Gram, num_attackers: int, ctx: RoundContext) -> Tensor:
        weights = torch.ones(len(gram), dtype=torch.float64)
        return geometric_median(gram, weights, self.iterations, self.smoothing)[None]


def geometric_median(gram: Gram, weights: Tensor, iterations: int | None = None, smoothing: float = 1e-6) -> Tensor:
    """The coefficients of the weighted geometric median, ``[n]``, float64.

    Args:
        gram: The geometry of the rows.
        weights: The rows' weights, ``[n]``.
        iterations: Number of smoothed Weiszfeld steps from the mean. None: until convergence, without smoothing.
        smoothing: Lower bound of the distances.
    """
    weights = weights / weights.sum()
    if iterations is None:
        at_row = _median_among_rows(gram, weights)
        if at_row is not None:
            return torch.eye(len(gram), dtype=torch.float64)[at_row]
        smoothing = 0.0
    coefficients = weights
    for _ in range(10_000 if iterations is None else iterations):
        distances = distances_to(gram, coefficients).clamp(min=max(smoothing, 1e-300))
        following = weights / distances
        following = following / following.sum()
        # Relative changes, because a coefficient near 0 may belong to an update far away.
        moved = ((following - coefficients).abs() / following).max()
        coefficients = following
        if iterations is None and moved < 1e-13:
            break
    return coefficients


def distances_to(gram: Gram, coefficients: Tensor) -> Tensor:
    r"""Distances of the rows from the mixture :math:`\sum_i c_i u_i`, whose coefficients add up to 1, ``[n]``."""
    along = gram.relative @ coefficients
    return (gram.relative.diagonal() - 2 * along + coefficients @ along).clamp(min=0).sqrt()


def _median_among_rows(gram: Gram, weights: Tensor) -> int | None:
    """The index of a row that is the median: the pull of the other rows does not exceed its own weight."""
    distances = gram.squared_distances.sqrt()
    for row in range(len(gram)):
        own = distances[row]
        here = own == 0
        pulls = torch.where(here, 0.0, weights / own)
        # The squared norm of the total pull, from the inner products relative to this row.
        relative = gram.relative - gram.relative[row] - gram.relative[:, row, None] + gram.relative[row, row]
        if float(pulls @ relative @ pulls) <= float(weights[here].sum()) ** 2:
            return row
    return None
