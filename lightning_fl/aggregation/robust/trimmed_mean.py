"""The coordinate-wise trimmed mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from lightning_fl.aggregation.robust.rule import CoordinateRule, PreAggregator


@dataclass(frozen=True)
class TrimmedMean(CoordinateRule):
    r"""The coordinate-wise trimmed mean: the mean without the :math:`f` smallest and :math:`f` largest values.

    .. math::
        x_j \leftarrow x_j + \frac{1}{n - 2f} \sum_{i = f + 1}^{n - f} (u_{(i)})_j

    With ``num_attackers=0`` it is the mean. Weights are ignored.

    Args:
        num_attackers: How many clients of a round may be attackers: a count, or a share of the cohort. Default 0.2.
        before: Pre-aggregators, which mix the updates first.

    Raises:
        ValueError: Before training, if a round has no more than twice as many clients as attackers.

    Reference:
        Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", ICML 2018.
    """

    num_attackers: int | float = 0.2
    before: Sequence[PreAggregator] = ()

    def combine(self, block: Tensor, num_attackers: int) -> Tensor:
        # Sorts the rows of a contiguous transpose: sorting down the columns takes more than twice as long.
        ordered = block.t().contiguous().sort(dim=1).values
        return ordered[:, num_attackers : len(block) - num_attackers].mean(1)
