"""Krum: the update closest to its neighbours; multi-Krum: the mean of several such updates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_fl.aggregation.context import RoundContext
from lightning_fl.aggregation.robust.gram import Gram, lowest, mean_of
from lightning_fl.aggregation.robust.rule import GramRule, PreAggregator


@dataclass(frozen=True)
class Krum(GramRule):
    r"""Krum: the one update that is closest to its :math:`n - f - 2` nearest neighbours.

    .. math::
        s_i = \sum_{j \in N_i} \lVert u_i - u_j \rVert^2, \qquad x \leftarrow x + u_{\arg\min_i s_i}

    Ties go to the client that comes first in the cohort. It follows one client per round, so it learns slowly from
    heterogeneous clients, and lazy clients that send zeros can win every round. Weights are ignored. ByzFL uses
    :math:`n - f - 1` neighbours, blades squares the distances twice, Garfield not at all.

    Args:
        num_attackers: How many clients of a round may be attackers: a count, or a share of the cohort. Default 0.2.
        before: Pre-aggregators, which mix the updates first.

    Raises:
        ValueError: Before training, if a round has fewer than :math:`2f + 3` clients.

    Reference:
        Blanchard et al., "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent", NeurIPS 2017.
    """

    num_attackers: int | float = 0.2
    before: Sequence[PreAggregator] = ()
    why = "not the update closest to its neighbours"

    def min_rows(self, num_attackers: int) -> int:
        return 2 * num_attackers + 3

    def matrix(self, gram: Gram, num_attackers: int, ctx: RoundContext) -> Tensor:
        return mean_of(lowest(krum_scores(gram.squared_distances, num_attackers), 1), len(gram))


@dataclass(frozen=True)
class MultiKrum(GramRule):
    r"""Multi-Krum: the mean of the :math:`m` updates with the lowest scores of :class:`Krum`. Weights are ignored.

    Args:
        num_attackers: How many clients of a round may be attackers: a count, or a share of the cohort. Default 0.2.
        num_selected: Number :math:`m` of updates that are averaged, from 1 to :math:`n - f`. Default None:
            :math:`n - f`.
        before: Pre-aggregators, which mix the updates first.

    Raises:
        ValueError: If ``num_selected`` is not positive; before training, if a round has fewer than :math:`2f + 3`
            clients.

    Reference:
        Blanchard et al., "Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent", NeurIPS 2017.
    """

    num_attackers: int | float = 0.2
    num_selected: int | None = None
    before: Sequence[PreAggregator] = ()
    why = "far from its nearest neighbours"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_selected is not None and self.num_selected < 1:
            raise ValueError(f"num_selected={self.num_selected} must be at least 1, or None for all but the attackers.")

    def min_rows(self, num_attackers: int) -> int:
        return max(2 * num_attackers + 3, num_attackers + (self.num_selected or 0))

    def matrix(self, gram: Gram, num_attackers: int, ctx: RoundContext) -> Tensor:
        num_selected = self.num_selected or len(gram) - num_attackers
        return mean_of(lowest(krum_scores(gram.squared_distances, num_attackers), num_selected), len(gram))


def krum_scores(squared_distances: Tensor, num_attackers: int) -> Tensor:
    """The sum of each row's squared distances to its :math:`n - f - 2` nearest neighbours, at least one.

    Args:
        squared_distances: ``[n, n]``.
        num_attackers: Number ``f`` of rows that may be attackers'.
    """
    others = squared_distances.clone().fill_diagonal_(torch.inf)
    return others.sort(dim=1).values[:, : max(1, len(others) - num_attackers - 2)].sum(1)
