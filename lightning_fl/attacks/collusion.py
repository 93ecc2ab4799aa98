"""Attacks that colluding clients craft from the honest clients' updates."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import torch

from lightning_fl.attacks.attack import CollusionAttack, HonestUpdates
from lightning_fl.tree import Flat

Direction = Literal["unit", "sign", "std"]


@dataclass(frozen=True)
class ALIE(CollusionAttack):
    r"""A little is enough: all attackers send :math:`\mu - z \sigma`, within the spread of the honest updates.

    .. math::
        z = \Phi^{-1}\Bigl(\frac{n - f - s}{n - f}\Bigr), \qquad s = \lfloor n / 2 \rfloor + 1 - f

    for :math:`n` clients with :math:`f` attackers; :math:`\mu` and :math:`\sigma` are the mean and the standard
    deviation (with divisor :math:`n - f`) of the honest updates.

    Args:
        z: The number :math:`z` of standard deviations. Default None: as above.

    Reference:
        Baruch et al., "A Little Is Enough: Circumventing Defenses For Distributed Learning", NeurIPS 2019.
    """

    z: float | None = None

    def craft(self, honest: HonestUpdates, num_attackers: int) -> Flat:
        z = alie_z(len(honest) + num_attackers, num_attackers) if self.z is None else self.z
        mean = honest.mean()
        return {dtype: mean[dtype] - z * std for dtype, std in honest.std(mean).items()}


def alie_z(num_clients: int, num_attackers: int) -> float:
    r"""The number :math:`z` of standard deviations at which attackers stay unnoticed.

    Raises:
        ValueError: If more than half of the clients are attackers, or there are fewer than 3 clients.
    """
    n, f = num_clients, num_attackers
    supporters = n // 2 + 1 - f
    if not 0 < supporters < n - f:
        raise ValueError(
            f"ALIE got {f} attackers among {n} clients; expected at most half of at least 3. Lower their number."
        )
    return NormalDist().inv_cdf((n - f - supporters) / (n - f))


@dataclass(frozen=True)
class IPM(CollusionAttack):
    r"""Inner-product manipulation: all attackers send :math:`-\epsilon \mu`, against the mean of the honest updates.

    The mean of all updates reverses its direction once :math:`\epsilon > (n - f) / f`.

    Args:
        epsilon: The factor :math:`\epsilon`. Default 1.

    Reference:
        Xie et al., "Fall of Empires: Breaking Byzantine-tolerant SGD by Inner Product Manipulation", UAI 2019.
    """

    epsilon: float = 1.0

    def craft(self, honest: HonestUpdates, num_attackers: int) -> Flat:
        return {dtype: -self.epsilon * mean for dtype, mean in honest.mean().items()}


@dataclass(frozen=True)
class MinMax(CollusionAttack):
    r"""Min-max: :math:`\mu + \gamma p`, no further from any honest update than two honest updates are from each other.

    .. math::
        \max_i \lVert \mu + \gamma p - u_i \rVert \le \max_{i, j} \lVert u_i - u_j \rVert

    The largest such :math:`\gamma` is computed in closed form, from one quadratic equation per honest update.

    Args:
        direction: The direction :math:`p`: ``"unit"``, :math:`-\mu / \lVert \mu \rVert`; ``"sign"``,
            :math:`-\operatorname{sign}(\mu)`; ``"std"``, :math:`-\sigma`. Default ``"std"``.

    Reference:
        Shejwalkar and Houmansadr, "Manipulating the Byzantine", NDSS 2021.
    """

    direction: Direction = "std"

    def craft(self, honest: HonestUpdates, num_attackers: int) -> Flat:
        mean, direction = _mean_and_direction(honest, self.direction)
        squares, along = honest.relative_to(mean, direction)
        limit, length = honest.gram().squared_distances.max(), _square(direction)
        # |mu - u_i|^2 + 2 gamma <p, mu - u_i> + gamma^2 |p|^2 = limit
        roots = (along + (along.square() + length * (limit - squares)).clamp(min=0).sqrt()) / max(length, 1e-300)
        return _moved(mean, direction, float(roots.min()) if length else 0.0)


@dataclass(frozen=True)
class MinSum(CollusionAttack):
    r"""Min-sum: :math:`\mu + \gamma p`, whose squared distances sum to at most those of some honest update.

    .. math::
        \sum_i \lVert \mu + \gamma p - u_i \rVert^2 \le \max_i \sum_j \lVert u_i - u_j \rVert^2

    Args:
        direction: The direction :math:`p`, as for :class:`MinMax`. Default ``"std"``.

    Reference:
        Shejwalkar and Houmansadr, "Manipulating the Byzantine", NDSS 2021.
    """

    direction: Direction = "std"

    def craft(self, honest: HonestUpdates, num_attackers: int) -> Flat:
        mean, direction = _mean_and_direction(honest, self.direction)
        squares, _ = honest.relative_to(mean, direction)
        # Relative to the mean, the products with p cancel, and sum_j |u_i - u_j|^2 = h |u_i - mu|^2 + sum_j ...
        room, length = len(honest) * squares.max(), len(honest) * _square(direction)
        return _moved(mean, direction, math.sqrt(float(room) / length) if length else 0.0)


@dataclass(frozen=True)
class Mimic(CollusionAttack):
    """All attackers copy one honest client, which is then over-represented.

    It copies the client whose update lies furthest along the direction in which the honest updates differ most.

    Reference:
        Karimireddy et al., "Byzantine-Robust Learning on Heterogeneous Datasets via Bucketing", ICLR 2022.
    """

    def craft(self, honest: HonestUpdates, num_attackers: int) -> Flat:
        n = len(honest)
        centre = torch.eye(n, dtype=torch.float64) - 1 / n
        along = torch.linalg.eigh(centre @ honest.gram().relative @ centre).eigenvectors[:, -1]
        return honest.row(int(along.abs().sort(descending=True, stable=True).indices[0]))


def _mean_and_direction(honest: HonestUpdates, name: Direction) -> tuple[Flat, Flat]:
    mean = honest.mean()
    if name == "std":
        return mean, {dtype: -std for dtype, std in honest.std(mean).items()}
    if name == "sign":
        return mean, {dtype: -own.sign() for dtype, own in mean.items()}
    length = math.sqrt(_square(mean)) or 1.0
    return mean, {dtype: -own / length for dtype, own in mean.items()}


def _square(flat: Flat) -> float:
    return sum(float(own @ own) for own in flat.values())


def _moved(mean: Flat, direction: Flat, gamma: float) -> Flat:
    return {dtype: own + gamma * direction[dtype] for dtype, own in mean.items()}
