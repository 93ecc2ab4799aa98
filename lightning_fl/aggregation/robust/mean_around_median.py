"""The mean of the values around the median."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from lightning_fl.aggregation.robust.median import Median
from lightning_fl.aggregation.robust.rule import CoordinateRule, PreAggregator


@dataclass(frozen=True)
class MeanAroundMedian(CoordinateRule):
    r"""In each coordinate the mean of the :math:`n - f` values closest to the median.

    Ties go to the client that comes first in the cohort. Weights are ignored.

    Args:
        num_attackers: How many clients of a round may be attackers: a count, or a share of the cohort. Default 0.2.
        before: Pre-aggregators, which mix the updates first.

    Raises:
        ValueError: Before training, if a round has no more than twice as many clients as attackers.

    Reference:
        Xie et al., "Generalized Byzantine-tolerant SGD", 2018.
    """

    num_attackers: int | float = 0.2
    before: Sequence[PreAggregator] = ()

    def combine(self, block: Tensor, num_attackers: int) -> Tensor:
        return mean_around_median(block, len(block) - num_attackers)


def mean_around_median(block: Tensor, num_kept: int) -> Tensor:
    """In each column the mean of the ``num_kept`` values closest to the median."""
    middle = Median(0).combine(block, 0)
    nearest = (block - middle).abs().t().contiguous().sort(dim=1, stable=True).indices[:, :num_kept]
    return block.t().gather(1, nearest).mean(1)
