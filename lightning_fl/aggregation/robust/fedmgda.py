"""FedMGDA+: a common descent direction for all clients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_fl.aggregation.context import RoundContext
from lightning_fl.aggregation.robust.gram import Gram, cosines_of
from lightning_fl.aggregation.robust.rule import GramRule, PreAggregator

STEPS = 1000


@dataclass(frozen=True)
class FedMGDA(GramRule):
    r"""FedMGDA+: the shortest convex combination of the clients' directions, along which every client's loss decreases.

    .. math::
        x \leftarrow x + \eta \sum_i \lambda_i \frac{u_i}{\lVert u_i \rVert}, \qquad
        \lambda = \arg\min_{\lambda \in \Delta, \; |\lambda_i - 1/n| \le \epsilon}
        \Big\lVert \sum_i \lambda_i \frac{u_i}{\lVert u_i \rVert} \Big\rVert^2

    Updates are normalised, so the step has a length of at most :math:`\eta`: choose it by the norms of the updates.
    :math:`\epsilon = 0` is the mean of the normalised updates. An update of zero has no direction and no effect.
    Weights are ignored.

    Args:
        epsilon: Largest deviation :math:`\epsilon` of a client's share from :math:`1/n`, in [0, 1]. Default 0.1; 1 is
            MGDA.
        step: The step length :math:`\eta`. Default None: the median of the updates' norms.
        num_attackers: Number of attackers in a round, which only sets how many clients a round needs. Default 0: the
            rule bounds an attacker's share by :math:`1/n + \epsilon` and offers no other protection.
        before: Pre-aggregators, which mix the updates first.

    Raises:
        ValueError: If ``epsilon`` is not in [0, 1] or ``step`` is not positive.

    Reference:
        Hu et al., "Federated Learning Meets Multi-Objective Optimization", IEEE TNSE 2022.
    """

    epsilon: float = 0.1
    step: float | None = None
    num_attackers: int | float = 0
    before: Sequence[PreAggregator] = ()
    shortens = True
    why = "its direction got no weight"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.epsilon <= 1:
            raise ValueError(f"epsilon={self.epsilon} must be in [0, 1].")
        if self.step is not None and not self.step > 0:
            raise ValueError(f"step={self.step} must be positive, or None for the median of the norms.")

    def matrix(self, gram: Gram, num_attackers: int, ctx: RoundContext) -> Tensor:
        norms = gram.norms
        length = float(torch.quantile(norms, 0.5)) if self.step is None else self.step
        shares = shortest_mixture(cosines_of(gram.products), self.epsilon)
        return torch.where(norms > 0, length * shares / norms, 0.0)[None]


def shortest_mixture(products: Tensor, epsilon: float = 1.0) -> Tensor:
    r"""The coefficients :math:`\lambda`, ``[n]``, of the shortest convex combination of rows.

    Computed from the rows' inner products by accelerated projected gradient descent.

    Args:
        products: Inner products of the rows, float64 ``[n, n]``.
        epsilon: Largest deviation of a coefficient from 1/n.
    """
    n = len(products)
    low, high = max(0.0, 1 / n - epsilon), min(1.0, 1 / n + epsilon)
    shares = ahead = torch.full((n,), 1 / n, dtype=torch.float64)
    step = 1 / max(float(torch.linalg.eigvalsh(products)[-1]), 1e-30)
    momentum = 1.0
    for _ in range(STEPS):
        found = _onto_box(ahead - step * (products @ ahead), low, high)
        # Restart the momentum if it leads uphill.
        if float((ahead - found) @ (found - shares)) > 0:
            momentum = 1.0
        following = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        ahead = found + (momentum - 1) / following * (found - shares)
        if float((found - shares).abs().max()) < 1e-15:
            break
        shares, momentum = found, following
    return shares


def _onto_box(values: Tensor, low: float, high: float) -> Tensor:
    """The nearest point whose elements are in [low, high] and add up to 1."""
    # Solves for the shift that is subtracted from all elements: between the points where an element meets a bound, the
    # sum decreases linearly with the shift.
    bends = torch.cat([values - low, values - high]).sort().values
    sums = (values - bends[:, None]).clamp(low, high).sum(1)
    place = int((sums >= 1).sum().clamp(1, len(bends) - 1))
    before, after = sums[place - 1], sums[place]
    part = (before - 1) / (before - after) if before > after else 0.0
    return (values - (bends[place - 1] + part * (bends[place] - bends[place - 1]))).clamp(low, high)
