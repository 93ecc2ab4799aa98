"""The weighted mean, computed by another rank in each round."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_fl.aggregation.context import RoundContext
from lightning_fl.aggregation.weighted_mean import WeightedMean
from lightning_fl.communication import Group
from lightning_fl.topologies import Swarm


@dataclass(frozen=True)
class ElectedMean(WeightedMean):
    """The weighted mean of :class:`~lightning_fl.topologies.Swarm`: the rank that is elected in a round computes it.

    Every other rank sends its sum to the elected rank only, and receives the total from it.

    Args:
        swarm: Elects the client of each round.
    """

    swarm: Swarm

    def total(self, flat: Tensor, group: Group, ctx: RoundContext) -> Tensor:
        """See :meth:`WeightedMean.total`."""
        # A client's home rank is its position modulo the number of ranks; each silo is a rank.
        elected, ranks = self.swarm.elected(ctx.population, ctx.round) % group.size, range(group.size)
        size, nothing = len(flat), flat[:0]
        is_elected = group.rank == elected
        sent = [flat if rank == elected else nothing for rank in ranks]
        parts = group.all_to_all(sent, [size if is_elected else 0 for _ in ranks])
        total = sum(parts[1:], parts[0])
        back = [total if is_elected else nothing for _ in ranks]
        return group.all_to_all(back, [size if rank == elected else 0 for rank in ranks])[elected]

    def report(self, acc: Any, ctx: RoundContext) -> Mapping[str, Any]:
        """The position of the elected client among all."""
        return {"elected": self.swarm.elected(ctx.population, ctx.round)}
