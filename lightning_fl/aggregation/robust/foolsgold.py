"""FoolsGold: clients that are too similar count less."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_fl.aggregation.context import RoundContext
from lightning_fl.aggregation.robust.gram import Gram
from lightning_fl.aggregation.robust.rule import GramRule, PreAggregator


@dataclass(frozen=True)
class FoolsGold(GramRule):
    r"""FoolsGold: a mean in which a client counts the less, the more similar another client's update is to its own.

    With the cosines :math:`\kappa_{ij}`, lowered for whoever is more like others than its neighbour is, the weight is
    :math:`1 - \max_j \kappa_{ij}`, stretched by a logit to [0, 1]. It is meant for many sybils with one aim;
    attackers that differ from each other win. Cosines are those of the round's updates, not of their sums over
    rounds. If all are the same, it is the mean. Weights are ignored.

    Args:
        num_attackers: How many clients of a round may be attackers: a count, or a share of the cohort. Default 0.2.
        before: Pre-aggregators, which mix the updates first.

    Raises:
        ValueError: Before training, if a round has no more than twice as many clients as attackers.

    Reference:
        Fung et al., "The Limitations of Federated Learning in Sybil Settings", RAID 2020.
    """

    num_attackers: int | float = 0.2
    before: Sequence[PreAggregator] = ()
    why = "too similar to another client's update"

    def matrix(self, gram: Gram, num_attackers: int, ctx: RoundContext) -> Tensor:
        weights = foolsgold(gram.cosines)
        total = weights.sum()
        return (weights / total if total > 0 else torch.full_like(weights, 1 / len(weights)))[None]


def foolsgold(cosines: Tensor) -> Tensor:
    """The weights of FoolsGold, ``[n]``, not normalised; all zero if the rows are the same."""
    others = cosines.clone().fill_diagonal_(0)
    largest = others.max(1).values
    # A client that looks like one with more likenesses of its own is pardoned in part.
    ratio = torch.where(largest > 0, largest[:, None] / largest, 0.0)
    others = torch.where(largest[:, None] < largest, others * ratio, others)
    weights = (1 - others.max(1).values).clamp(0, 1)
    # Cosines of rows that are the same differ from 1 by rounding.
    if not weights.max() > 1e-9:
        return torch.zeros_like(weights)
    weights = (weights / weights.max()).clamp(max=0.99)
    return (torch.log(weights / (1 - weights)) + 0.5).clamp(0, 1)
