"""FLAME: the largest cluster by direction, at the median length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_fl.aggregation.context import RoundContext
from lightning_fl.aggregation.robust.gram import Gram
from lightning_fl.aggregation.robust.norm_bound import shortening
from lightning_fl.aggregation.robust.rule import GramRule, PreAggregator


@dataclass(frozen=True)
class FLAME(GramRule):
    r"""FLAME: the mean over the cluster of more than half of the updates, each clipped to the median norm.

    Updates are merged in the order of their cosine distances; the first cluster with more than half of them is used.
    This is what HDBSCAN finds with that minimum cluster size and ``min_samples=1``, the paper's settings. The paper's
    noise is left out: for a privacy guarantee see ``fl.privacy.ClientLevelDP``. Weights are ignored.

    Args:
        num_attackers: How many clients of a round may be attackers: a count, or a share of the cohort. Default 0.2.
        before: Pre-aggregators, which mix the updates first.

    Raises:
        ValueError: Before training, if a round has no more than twice as many clients as attackers.

    Reference:
        Nguyen et al., "FLAME: Taming Backdoors in Federated Learning", USENIX Security 2022.
    """

    num_attackers: int | float = 0.2
    before: Sequence[PreAggregator] = ()
    shortens = True
    why = "its direction is not that of the majority"

    def matrix(self, gram: Gram, num_attackers: int, ctx: RoundContext) -> Tensor:
        inside = majority(1 - gram.cosines)
        return (torch.where(inside, shortening(gram.norms), 0.0) / inside.sum())[None]


def majority(distances: Tensor) -> Tensor:
    """The first cluster of more than half of the points in single-linkage clustering, as a mask ``[n]``."""
    n = len(distances)
    groups = torch.arange(n)
    first, second = torch.triu_indices(n, n, 1)
    steps = distances[first, second].sort(stable=True)
    for place in steps.indices.tolist():
        groups = torch.where(groups == groups[second[place]], groups[first[place]], groups)
        inside = groups == groups[first[place]]
        if 2 * int(inside.sum()) > n:
            return inside
    return torch.ones(n, dtype=torch.bool)
