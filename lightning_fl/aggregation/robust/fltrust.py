"""FLTrust: weights updates by their cosine to an update that the server trusts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_fl.aggregation.context import RoundContext
from lightning_fl.aggregation.robust.gram import Gram
from lightning_fl.aggregation.robust.rows import Rows
from lightning_fl.aggregation.robust.rule import GramRule
from lightning_fl.aggregation.robust.validation_check import described, loader_of
from lightning_fl.tree import Flat, update_trees
from lightning_fl.types import ClientId


@dataclass(frozen=True, repr=False)
class FLTrust(GramRule):
    r"""FLTrust: updates are scaled to the norm of a root update :math:`u_0` and weighted by their cosine to it.

    .. math::
        t_i = \max\Bigl(0, \frac{\langle u_i, u_0 \rangle}{\lVert u_i \rVert \lVert u_0 \rVert}\Bigr), \qquad
        x \leftarrow x + \frac{1}{\sum_i t_i} \sum_i t_i \frac{\lVert u_0 \rVert}{\lVert u_i \rVert} u_i

    The root data set is a small clean data set of the federation's operator. In a simulation the server itself trains
    on it in each round, on the first rank, for as many steps as the client with the most work; among silos it belongs
    to a root client, which trains like the others. The root update itself is not added to the model. If no client is
    trusted, the model is unchanged. Weights are ignored.

    Args:
        root: The root data: a DataLoader; a data set, read in shuffled batches of 32; or the id of the root client,
            which has to take part in every round.
        num_attackers: How many clients of a round may be attackers: a count, or a share of the cohort. Default 0.2.

    Raises:
        ValueError: If ``root`` is none of these; in a round without the root client; before training, if the server has
            data among silos.

    Reference:
        Cao et al., "FLTrust: Byzantine-robust Federated Learning via Trust Bootstrapping", NDSS 2021.
    """

    root: ClientId | DataLoader[Any] | Dataset[Any]
    num_attackers: int | float = 0.2
    before = ()
    shortens = True
    why = "it points away from the root's update"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.root, bool) or not isinstance(self.root, int | str):
            object.__setattr__(self, "root", loader_of(self.root, shuffle=True))

    def __repr__(self) -> str:
        root = f"root={self.root!r}" if self.server_data is None else described(self.server_data)
        return f"FLTrust({root}, num_attackers={self.num_attackers})"

    @property
    def server_data(self) -> DataLoader[Any] | None:
        return self.root if isinstance(self.root, DataLoader) else None

    def min_rows(self, num_attackers: int) -> int:
        return 2 if self.server_data is None else 1

    def beside(self, rows: Rows, clients: Sequence[ClientId], ctx: RoundContext) -> Flat:
        if self.server_data is None:
            return {}
        assert ctx.root is not None, "the server has not trained on its data"
        return rows.of_trees([update_trees(ctx.root)])

    def matrix(self, gram: Gram, num_attackers: int, ctx: RoundContext) -> Tensor:
        if self.server_data is not None:
            return fltrust(gram, gram.num_updates)[None]
        if self.root not in gram.clients:
            raise ValueError(
                f"Round {ctx.round} lacks the update of the root client {self.root!r}, to which FLTrust compares the "
                "others. Let all clients take part (clients_per_round=None), or name one that takes part."
            )
        return fltrust(gram, list[Any](gram.clients).index(self.root))[None]


def fltrust(gram: Gram, root: int) -> Tensor:
    """The coefficients of FLTrust, ``[n]``, where ``root`` is the index of the root update."""
    norms = gram.norms
    trust = gram.cosines[root].clamp(min=0)
    trust[root] = 0.0
    total = trust.sum()
    if not total > 0:
        return torch.zeros_like(trust)
    return torch.where(trust > 0, trust * norms[root] / norms, 0.0) / total
