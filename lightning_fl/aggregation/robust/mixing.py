"""Pre-aggregators, which mix updates so that those of honest clients become more similar."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_fl.aggregation.context import RoundContext
from lightning_fl.aggregation.robust.gram import Gram
from lightning_fl.aggregation.robust.rule import PreAggregator
from lightning_fl.seeding import round_rng


@dataclass(frozen=True)
class NearestNeighborMixing(PreAggregator):
    r"""Nearest-neighbour mixing: replaces each update by the mean of the :math:`n - f` nearest ones, including itself.

    .. math::
        v_i = \frac{1}{n - f} \sum_{j \in N_i} u_j

    Reference:
        Allouah et al., "Fixing by Mixing: A Recipe for Optimal Byzantine ML under Heterogeneity", AISTATS 2023.
    """

    def matrix(self, gram: Gram, num_attackers: int, ctx: RoundContext) -> Tensor:
        n = len(gram)
        nearest = gram.squared_distances.fill_diagonal_(-1).sort(dim=1, stable=True).indices[:, : n - num_attackers]
        mixing = torch.zeros(n, n, dtype=torch.float64)
        return mixing.scatter_(1, nearest, 1 / (n - num_attackers))


@dataclass(frozen=True)
class Bucketing(PreAggregator):
    """Bucketing: assigns the updates to random buckets, and replaces each bucket by its mean.

    The rule then sees fewer, more similar rows; the number of rows that may be corrupt stays the number of attackers.
    The last bucket may be smaller.

    Args:
        size: Number of updates in a bucket. Default 2.

    Raises:
        ValueError: If ``size`` is less than 1.

    Reference:
        Karimireddy et al., "Byzantine-Robust Learning on Heterogeneous Datasets via Bucketing", ICLR 2022.
    """

    size: int = 2

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size={self.size} must be at least 1; it is the number of updates in a bucket.")

    def num_rows(self, num_rows: int) -> int:
        return -(-num_rows // self.size)

    def matrix(self, gram: Gram, num_attackers: int, ctx: RoundContext) -> Tensor:
        n = len(gram)
        order = torch.from_numpy(round_rng(ctx.seed, ctx.round, "bucketing").permutation(n))
        mixing = torch.zeros(self.num_rows(n), n, dtype=torch.float64)
        for bucket, members in enumerate(order.split(self.size)):
            mixing[bucket, members] = 1 / len(members)
        return mixing
