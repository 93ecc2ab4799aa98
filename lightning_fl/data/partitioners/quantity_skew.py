"""Quantity skew: partitioners whose clients get random samples, but not equally many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np

from lightning_fl.data.partitioners.label_skew import apportion, random_sizes
from lightning_fl.data.partitioners.partitioner import Partitioner


@dataclass(frozen=True)
class DirichletSizes(Partitioner):
    r"""Random samples, in proportions drawn from :math:`\mathrm{Dir}(\alpha, \dots, \alpha)`.

    Each client gets ``min_size`` samples; the rest is divided in these proportions.

    Args:
        alpha: Concentration, positive and finite; the smaller, the more the sizes differ.
        min_size: Minimum number of samples per client, at least 0.

    Raises:
        ValueError: If an argument is out of range; when called, if there are too few samples for ``min_size``.

    References:
        Li, Diao, Chen, He, *Federated Learning on Non-IID Data Silos: An Experimental Study* (NIID-Bench), 2022,
        arXiv:2102.02079.
    """

    alpha: float
    _: KW_ONLY
    min_size: int = 1

    def __post_init__(self) -> None:
        """Checks the arguments."""
        if not 0 < self.alpha < float("inf"):
            raise ValueError(f"alpha={self.alpha} must be positive and finite; for equal sizes use IID().")
        _check_min_size(self.min_size)

    def split(self, dataset: Any, num_clients: int, rng: np.random.Generator) -> Sequence[np.ndarray]:
        """See :meth:`Partitioner.split`."""
        remaining = _num_remaining(len(dataset), num_clients, self.min_size)
        sizes = self.min_size + apportion(remaining, rng.dirichlet(np.full(num_clients, self.alpha)))
        return _split_randomly(len(dataset), sizes, rng)


@dataclass(frozen=True)
class LognormalSizes(Partitioner):
    r"""Random samples, in proportions :math:`e^{\sigma z}` with :math:`z \sim N(0, 1)`.

    Each client gets ``min_size`` samples; the rest is divided in these proportions.

    Args:
        sigma: Standard deviation of the logarithm of the proportions, at least 0.
        min_size: Minimum number of samples per client, at least 0.

    Raises:
        ValueError: If an argument is out of range; when called, if there are too few samples for ``min_size``.
    """

    sigma: float
    _: KW_ONLY
    min_size: int = 1

    def __post_init__(self) -> None:
        """Checks the arguments."""
        if not 0 <= self.sigma < float("inf"):
            raise ValueError(f"sigma={self.sigma} must be at least 0 and finite; 0 gives equal sizes.")
        _check_min_size(self.min_size)

    def split(self, dataset: Any, num_clients: int, rng: np.random.Generator) -> Sequence[np.ndarray]:
        """See :meth:`Partitioner.split`."""
        _num_remaining(len(dataset), num_clients, self.min_size)  # raises if min_size can't be met
        sizes = random_sizes(len(dataset), num_clients, self.min_size, self.sigma, rng)
        return _split_randomly(len(dataset), sizes, rng)


def _check_min_size(min_size: int) -> None:
    if min_size < 0:
        raise ValueError(f"min_size={min_size} must be at least 0.")


def _num_remaining(num_samples: int, num_clients: int, min_size: int) -> int:
    remaining = num_samples - num_clients * min_size
    if remaining < 0:
        raise ValueError(
            f"min_size={min_size} for {num_clients} clients needs {num_clients * min_size} samples, found "
            f"{num_samples}. Use fewer clients or a smaller min_size."
        )
    return remaining


def _split_randomly(num_samples: int, sizes: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    return np.split(rng.permutation(num_samples), np.cumsum(sizes)[:-1])
