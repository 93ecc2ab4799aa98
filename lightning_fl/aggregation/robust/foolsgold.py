"""FoolsGold: reduces the weight of clients whose updates are too similar."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_fl.aggregation.context import RoundContext
from lightning_fl.aggregation.robust.gram import Gram, cosines_of
from lightning_fl.aggregation.robust.rows import RoundRows, Rows, complete
from lightning_fl.aggregation.robust.rule import GramRule, PreAggregator
from lightning_fl.tree import Flat, clone, updated
from lightning_fl.types import ClientId, State


@dataclass(frozen=True)
class FoolsGold(GramRule):
    r"""FoolsGold: a mean that gives a client the less weight, the more similar another client's update is to its own.

    A client's weight is :math:`1 - \max_j \kappa_{ij}`, mapped by a logit to [0, 1]. The cosines :math:`\kappa_{ij}`
    are reduced where j has a larger maximum similarity than i, so that honest clients that resemble a sybil keep their
    weight. The rule is meant for many sybils with a common aim; it does not stop attackers whose updates differ. The
    cosines are those of each client's updates summed over the rounds, in which a common aim stands out from the noise
    of a single round. These sums take the memory of one model per client that has taken part, on each rank. If all
    rows are equal, the result is the mean. The clients' own weights are ignored.

    Args:
        num_attackers: How many clients of a round may be attackers: a count, or a share of the cohort. Default 0.2.
        before: Pre-aggregators, which mix the updates first; with ``memory=False`` only.
        memory: Whether updates are summed over the rounds. False: only the round's updates. Default True.

    Raises:
        ValueError: If ``before`` is given and ``memory`` is True; before training, if a round has no more than twice as
            many clients as attackers.

    Reference:
        Fung et al., "The Limitations of Federated Learning in Sybil Settings", RAID 2020.
    """

    num_attackers: int | float = 0.2
    before: Sequence[PreAggregator] = ()
    memory: bool = True
    why = "too similar to another client's update"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.memory and self.before:
            raise ValueError(
                f"before={self.before!r} mixes clients, but FoolsGold keeps the sum of each client's updates. Leave "
                "before out, or set memory=False."
            )

    def beside(self, rows: Rows, clients: Sequence[ClientId], ctx: RoundContext) -> Flat:
        sums = ctx.memory.get("sums", {})
        return rows.of_trees([{"delta": sums.get(_key(client), {})} for client in clients]) if self.memory else {}

    def keep(self, rows: RoundRows, flat: Flat, clients: Sequence[ClientId], ctx: RoundContext) -> State:
        if not self.memory:
            return {}
        sums = dict(ctx.memory.get("sums", {}))
        totals = complete({dtype: own + rows.beside[dtype] for dtype, own in rows.everywhere().items()})
        for place, client in enumerate(clients):
            trees = rows.rows.layout.unflatten({dtype: own[place] for dtype, own in totals.items()})
            # A copy, since a view would keep the rows of the whole cohort in memory.
            sums[_key(client)] = updated(sums.get(_key(client), {}), clone(trees.get("delta", {})))
        return {"sums": sums}

    def matrix(self, gram: Gram, num_attackers: int, ctx: RoundContext) -> Tensor:
        n, products = gram.num_updates, gram.products
        if gram.num_beside:
            added = torch.eye(n, dtype=torch.float64).repeat(1, 2)
            products = added @ products @ added.t()
        weights = foolsgold(cosines_of(products))
        total = weights.sum()
        weights = weights / total if total > 0 else torch.full_like(weights, 1 / n)
        return torch.cat([weights, torch.zeros(gram.num_beside, dtype=torch.float64)])[None]


def _key(client: ClientId) -> str:
    """A string key for the client that distinguishes the number 3 from the string "3"."""
    return repr(client)


def foolsgold(cosines: Tensor) -> Tensor:
    """The weights of FoolsGold, ``[n]``, not normalised; all zero if the rows are equal."""
    others = cosines.clone().fill_diagonal_(0)
    largest = others.max(1).values
    # "Pardoning": reduce the similarity to clients that are themselves more similar to others.
    ratio = torch.where(largest > 0, largest[:, None] / largest, 0.0)
    others = torch.where(largest[:, None] < largest, others * ratio, others)
    weights = (1 - others.max(1).values).clamp(0, 1)
    # Cosines of equal rows differ from 1 by rounding.
    if not weights.max() > 1e-9:
        return torch.zeros_like(weights)
    weights = (weights / weights.max()).clamp(max=0.99)
    return (torch.log(weights / (1 - weights)) + 0.5).clamp(0, 1)
