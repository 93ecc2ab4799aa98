"""FLTrust: trust by direction, relative to an update that the server trusts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_fl.aggregation.context import RoundContext
from lightning_fl.aggregation.robust.gram import Gram
from lightning_fl.aggregation.robust.rule import GramRule
from lightning_fl.types import ClientId


@dataclass(frozen=True)
class FLTrust(GramRule):
    r"""FLTrust: updates count by the cosine to the update :math:`u_0` of a root client, at its length.

    .. math::
        t_i = \max\Bigl(0, \frac{\langle u_i, u_0 \rangle}{\lVert u_i \rVert \lVert u_0 \rVert}\Bigr), \qquad
        x \leftarrow x + \frac{1}{\sum_i t_i} \sum_i t_i \frac{\lVert u_0 \rVert}{\lVert u_i \rVert} u_i

    The root client holds a small clean data set of whoever runs the federation. It trains in each round as the others
    do, and itself adds nothing to the model. If nobody is trusted, the model stays as it is. Weights are ignored.

    Args:
        root: The root client; it has to take part in every round.
        num_attackers: How many clients of a round may be attackers: a count, or a share of the cohort. Default 0.2.

    Raises:
        ValueError: In a round without the root client.

    Reference:
        Cao et al., "FLTrust: Byzantine-robust Federated Learning via Trust Bootstrapping", NDSS 2021.
    """

    root: ClientId
    num_attackers: int | float = 0.2
    before = ()
    why = "it points away from the root client's update"

    def min_rows(self, num_attackers: int) -> int:
        return 2

    def matrix(self, gram: Gram, num_attackers: int, ctx: RoundContext) -> Tensor:
        if self.root not in gram.clients:
            raise ValueError(
                f"Round {ctx.round} lacks the update of the root client {self.root!r}, by which FLTrust measures the "
                "others. Let all clients take part (clients_per_round=None), or name one that does."
            )
        return fltrust(gram, list(gram.clients).index(self.root))[None]


def fltrust(gram: Gram, root: int) -> Tensor:
    """The coefficients of FLTrust with the row ``root`` as the root client's, ``[n]``."""
    norms = gram.norms
    trust = gram.cosines[root].clamp(min=0)
    trust[root] = 0.0
    total = trust.sum()
    if not total > 0:
        return torch.zeros_like(trust)
    return torch.where(trust > 0, trust * norms[root] / norms, 0.0) / total
