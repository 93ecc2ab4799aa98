"""The coordinate-wise median."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from lightning_fl.aggregation.robust.rule import CoordinateRule, PreAggregator, coordinate_median


@dataclass(frozen=True)
class Median(CoordinateRule):
    r"""The coordinate-wise median; for an even number of values, the mean of the two in the middle.

    .. math::
        x_j \leftarrow x_j + \operatorname{median}_i \, (u_i)_j

    It tolerates attackers up to just below half of the clients, but with a few colluding attackers (IPM) or very
    heterogeneous clients it is worse than rules that average. Weights are ignored. ``torch.median`` takes the lower of
    the two values.

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
        return coordinate_median(block)
