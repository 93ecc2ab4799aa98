"""Centered clipping."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_fl.aggregation.context import RoundContext
from lightning_fl.aggregation.robust.gram import Gram
from lightning_fl.aggregation.robust.rows import RoundRows, Rows, complete
from lightning_fl.aggregation.robust.rule import GramRule, PreAggregator
from lightning_fl.tree import Flat, updated
from lightning_fl.types import ClientId, State


@dataclass(frozen=True)
class CenteredClipping(GramRule):
    r"""Centered clipping: averages the updates, each clipped to a distance of :math:`\tau` from the last result.

    .. math::
        v \leftarrow v + \frac{1}{n} \sum_i (u_i - v) \min\Bigl(1, \frac{\tau}{\lVert u_i - v \rVert}\Bigr)

    :math:`v` starts at the last round's result (in the first round at zero), so that a small radius suffices once
    :math:`v` is close to the updates. An attacker moves the model by at most :math:`\tau / n` per step, but in every
    round: a patient backdoor attack succeeds. Weights are ignored.

    Args:
        tau: The clipping radius :math:`\tau`, in units of the parameters. Default 1.
        iterations: Number of steps. Default 3.
        num_attackers: How many clients of a round may be attackers: a count, or a share of the cohort. Default 0.2.
        before: Pre-aggregators, which mix the updates first.
        memory: Whether to start from the last round's result. False: from zero in each round. Default True.

    Raises:
        ValueError: If ``tau`` or ``iterations`` is not positive; before training, if a round has no more than twice as
            many clients as attackers.

    Reference:
        Karimireddy et al., "Learning from History for Byzantine Robust Optimization", ICML 2021.
    """

    tau: float = 1.0
    iterations: int = 3
    num_attackers: int | float = 0.2
    before: Sequence[PreAggregator] = ()
    shortens = True
    memory: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.tau > 0 or self.iterations < 1:
            raise ValueError(f"tau={self.tau} must be positive and iterations={self.iterations} at least 1.")

    def beside(self, rows: Rows, clients: Sequence[ClientId], ctx: RoundContext) -> Flat:
        return rows.of_trees([ctx.memory["centre"]]) if ctx.memory else {}

    def keep(self, rows: RoundRows, flat: Flat, clients: Sequence[ClientId], ctx: RoundContext) -> State:
        return updated(ctx.memory, {"centre": rows.rows.layout.unflatten(complete(flat))}) if self.memory else {}

    def matrix(self, gram: Gram, num_attackers: int, ctx: RoundContext) -> Tensor:
        products, n = gram.products, gram.num_updates
        coefficients = torch.zeros(len(gram), dtype=torch.float64)
        coefficients[n:] = 1.0  # the centre of the last round, if there is one
        for _ in range(self.iterations):
            along = products @ coefficients
            distances = (products.diagonal() - 2 * along + coefficients @ along).clamp(min=1e-300).sqrt()
            pulls = (self.tau / distances).clamp(max=1.0) / n
            pulls[n:] = 0.0
            coefficients = coefficients * (1 - pulls.sum()) + pulls
        return coefficients[None]
