"""The mean of updates clipped to a norm bound."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_fl.aggregation.context import RoundContext
from lightning_fl.aggregation.robust.gram import Gram
from lightning_fl.aggregation.robust.rule import GramRule, PreAggregator


@dataclass(frozen=True)
class NormBound(GramRule):
    r"""The mean of the updates, each clipped to a norm of at most :math:`C`.

    .. math::
        x \leftarrow x + \frac{1}{n} \sum_i u_i \min\Bigl(1, \frac{C}{\lVert u_i \rVert}\Bigr)

    It only bounds the influence of one client in a round. The server clips the updates, because an attacker would not
    clip its own. Weights are ignored.

    Args:
        bound: The bound :math:`C`, an L2 norm. Default None: the median of the round's norms.
        num_attackers: How many clients of a round may be attackers: a count, or a share of the cohort. Default 0.2.
        before: Pre-aggregators, which mix the updates first.

    Raises:
        ValueError: If ``bound`` is not positive; before training, if a round has no more than twice as many clients as
            attackers.

    Reference:
        Sun et al., "Can You Really Backdoor Federated Learning?", 2019.
    """

    bound: float | None = None
    num_attackers: int | float = 0.2
    before: Sequence[PreAggregator] = ()
    shortens = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bound is not None and not self.bound > 0:
            raise ValueError(f"bound={self.bound} must be positive, or None for the median of the norms.")

    def matrix(self, gram: Gram, num_attackers: int, ctx: RoundContext) -> Tensor:
        return (shortening(gram.norms, self.bound) / len(gram))[None]


def shortening(norms: Tensor, bound: float | None = None) -> Tensor:
    """The factors that clip rows of these norms to the bound, or to the median of the norms, ``[n]``."""
    limit = torch.quantile(norms, 0.5) if bound is None else torch.tensor(bound, dtype=norms.dtype)
    return torch.where(norms > limit, limit / norms, 1.0)
