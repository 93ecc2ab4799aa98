"""Bulyan: selection by Krum, then the mean around the median."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from lightning_fl.aggregation.context import RoundContext
from lightning_fl.aggregation.robust.gram import Gram, lowest, selection
from lightning_fl.aggregation.robust.krum import krum_scores
from lightning_fl.aggregation.robust.mean_around_median import mean_around_median
from lightning_fl.aggregation.robust.rule import CoordinateRule, PreAggregator


@dataclass(frozen=True)
class Bulyan(CoordinateRule):
    r"""Bulyan: the mean around the median of the updates that Krum selects.

    Krum picks :math:`\theta = n - 2f` updates, one after another, each among the remaining ones. The result is, in each
    coordinate, the mean of the :math:`\theta - 2f` values closest to their median. Krum's number of neighbours
    decreases with the number of remaining updates, and is at least one. Weights are ignored.

    Args:
        num_attackers: How many clients of a round may be attackers: a count, or a share of the cohort. Default 0.2.
        before: Pre-aggregators, which mix the updates first.

    Raises:
        ValueError: Before training, if a round has fewer than :math:`4f + 3` clients.

    Reference:
        El Mhamdi et al., "The Hidden Vulnerability of Distributed Learning in Byzantium", ICML 2018.
    """

    num_attackers: int | float = 0.2
    before: Sequence[PreAggregator] = ()
    why = "not selected by Krum"

    def min_rows(self, num_attackers: int) -> int:
        return 4 * num_attackers + 3

    def matrix(self, gram: Gram, num_attackers: int, ctx: RoundContext) -> Tensor:
        left, distances = list(range(len(gram))), gram.squared_distances
        chosen = []
        for _ in range(len(gram) - 2 * num_attackers):
            # The last remaining row has none to be compared with.
            place = int(lowest(krum_scores(distances[left][:, left], num_attackers), 1)) if len(left) > 1 else 0
            chosen.append(left.pop(place))
        return selection(chosen, len(gram))

    def combine(self, block: Tensor, num_attackers: int) -> Tensor:
        return mean_around_median(block, len(block) - 2 * num_attackers)
