"""Divide and conquer: finds outliers along the direction in which the updates differ most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_fl.aggregation.context import RoundContext
from lightning_fl.aggregation.robust.gram import Gram, lowest, mean_of
from lightning_fl.aggregation.robust.rule import GramRule, PreAggregator


@dataclass(frozen=True)
class DnC(GramRule):
    r"""Divide and conquer: the mean without the :math:`f` updates that lie furthest out along the top singular vector.

    .. math::
        s_i = \langle u_i - \bar u, v \rangle^2, \qquad v = \arg\max_{\lVert v \rVert = 1}
        \sum_i \langle u_i - \bar u, v \rangle^2

    It uses all coordinates at once; the Gram matrix makes this as cheap as the paper's random subsets of coordinates.
    Weights are ignored.

    Args:
        num_attackers: How many clients of a round may be attackers: a count, or a share of the cohort. Default 0.2.
        before: Pre-aggregators, which mix the updates first.

    Raises:
        ValueError: Before training, if a round has no more than twice as many clients as attackers.

    Reference:
        Shejwalkar and Houmansadr, "Manipulating the Byzantine", NDSS 2021.
    """

    num_attackers: int | float = 0.2
    before: Sequence[PreAggregator] = ()
    why = "an outlier along the direction in which the updates differ most"

    def matrix(self, gram: Gram, num_attackers: int, ctx: RoundContext) -> Tensor:
        n = len(gram)
        centre = torch.eye(n, dtype=torch.float64) - 1 / n
        # The eigenvectors of the centred Gram matrix are the rows' projections on the singular vectors, up to scale.
        along = torch.linalg.eigh(centre @ gram.relative @ centre).eigenvectors[:, -1]
        return mean_of(lowest(along.square(), n - num_attackers), n)
