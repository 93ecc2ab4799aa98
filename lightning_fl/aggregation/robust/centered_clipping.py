"""Centered clipping."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_fl.aggregation.context import RoundContext
from lightning_fl.aggregation.robust.gram import Gram
from lightning_fl.aggregation.robust.rule import GramRule, PreAggregator


@dataclass(frozen=True)
class CenteredClipping(GramRule):
    r"""Centered clipping: from zero, steps towards the updates, each of which pulls no further than :math:`\tau`.

    .. math::
        v \leftarrow v + \frac{1}{n} \sum_i (u_i - v) \min\Bigl(1, \frac{\tau}{\lVert u_i - v \rVert}\Bigr)

    An attacker moves the model by at most :math:`\tau / n` a step, but in every round: a patient backdoor gets through.
    Weights are ignored.

    Args:
        tau: The radius :math:`\tau` of the clipping. Default 1.
        iterations: Steps. Default 3.
        num_attackers: How many clients of a round may be attackers: a count, or a share of the cohort. Default 0.2.
        before: Pre-aggregators, which mix the updates first.

    Raises:
        ValueError: If ``tau`` is not positive; before training, if a round has no more than twice as many clients as
            attackers.

    Reference:
        Karimireddy et al., "Learning from History for Byzantine Robust Optimization", ICML 2021.
    """

    tau: float = 1.0
    iterations: int = 3
    num_attackers: int | float = 0.2
    before: Sequence[PreAggregator] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.tau > 0 or self.iterations < 1:
            raise ValueError(f"tau={self.tau} must be positive and iterations={self.iterations} at least 1.")

    def matrix(self, gram: Gram, num_attackers: int, ctx: RoundContext) -> Tensor:
        products, n = gram.products, len(gram)
        coefficients = torch.zeros(n, dtype=torch.float64)
        for _ in range(self.iterations):
            along = products @ coefficients
            distances = (products.diagonal() - 2 * along + coefficients @ along).clamp(min=1e-300).sqrt()
            pulls = (self.tau / distances).clamp(max=1.0) / n
            coefficients = coefficients * (1 - pulls.sum()) + pulls
        return coefficients[None]
