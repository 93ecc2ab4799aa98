"""Mean and standard deviation of columns under differential privacy."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from lightning_fl.privacy.accounting.ledger import Gaussian
from lightning_fl.privacy.noise import SecureNoise, add_noise, check_added, check_source, warn_of_test_seed

MIN_STD = 1e-2
"""The smallest standard deviation, as a share of half the range: noise may make a variance negative."""
Unit = Literal["client", "example"]


@dataclass(frozen=True)
class ScalingRelease:
    """A release of mean and standard deviation, for the ledgers of the runs that use it.

    Args:
        id: A random string that identifies the release, so that a ledger counts each once.
        noise_multiplier: Its noise, relative to the largest contribution.
        unit: The protected unit: a ``"client"`` with all its rows, or an ``"example"``.
    """

    id: str
    noise_multiplier: float
    unit: Unit

    @property
    def event(self) -> Gaussian:
        """The release as a ledger records it."""
        return Gaussian(self.noise_multiplier)


@dataclass(frozen=True)
class PrivateScaling:
    r"""Mean and standard deviation of columns by one Gaussian release.

    Values are clipped to public ranges and mapped to :math:`u \in [-1, 1]^d`. Each contributor adds
    :math:`(1, u, u^2)`, of norm at most :math:`C = \sqrt{1 + 2d}`, and

    .. math::
        (n, s, q) = \sum_i (1, u_i, u_i^2) + \mathcal{N}(0, z^2 C^2), \qquad
        \text{mean} = s / n, \quad \text{std}^2 = q / n - (s / n)^2

    are mapped back. With ``unit="client"`` a client adds the means over its rows, so that all clients weigh the same.
    Missing values count as the middle of their range.

    Args:
        ranges: The smallest and largest value of each column, from public knowledge and not from the data.
        noise_multiplier: The noise :math:`z`. The error of each mean is about :math:`z C / n` half ranges. 0: NOT
            PRIVATE.
        unit: The protected unit, a ``"client"`` or an ``"example"``, the same as in training.
        insecure_test_seed: Makes the noise reproducible, for tests. The release is then NOT PRIVATE.

    Raises:
        ValueError: If a range is empty or not finite, or an argument is out of range.

    Example:
        >>> scaling = PrivateScaling({"age": (0, 120), "income": (0, 200_000)}, noise_multiplier=5.0)
    """

    ranges: Mapping[str, tuple[float, float]]
    noise_multiplier: float
    unit: Unit = "client"
    insecure_test_seed: int | None = None

    def __post_init__(self) -> None:
        if not self.ranges:
            raise ValueError("PrivateScaling got no ranges; give the smallest and largest value of each column.")
        for column, (low, high) in self.ranges.items():
            if not -math.inf < low < high < math.inf:
                raise ValueError(f"PrivateScaling got the range ({low}, {high}) of {column!r}; expected low < high.")
        if self.unit not in ("client", "example"):
            raise ValueError(f"PrivateScaling got unit={self.unit!r}; expected 'client' or 'example'.")
        # Built for its checks only.
        Gaussian(self.noise_multiplier)
        SecureNoise()
        if self.insecure_test_seed is not None:
            warn_of_test_seed()

    @property
    def sensitivity(self) -> float:
        """The largest norm :math:`C` of a contribution."""
        return math.sqrt(1 + 2 * len(self.ranges))

    def fit(
        self, values: Mapping[str, np.ndarray], owners: np.ndarray
    ) -> tuple[dict[str, tuple[float, float]], ScalingRelease]:
        """Releases mean and standard deviation; each call is another release.

        Args:
            values: The values of each column of ``ranges``, shape ``[num_rows]``.
            owners: The client of each row, as numbers from 0, shape ``[num_rows]``.

        Returns:
            Mean and standard deviation of each column, and the release, for ledgers.

        Raises:
            PrivacyError: If the noise is not what the ledger records.
        """
        lows, highs = np.array(list(self.ranges.values()), dtype=np.float64).T
        middle, half = (lows + highs) / 2, (highs - lows) / 2
        raw = np.stack([np.asarray(values[column], dtype=np.float64) for column in self.ranges], axis=1)
        # Clipped before the difference, which overflows for the largest numbers; NaN passes the clip.
        units = np.nan_to_num((np.clip(raw, lows, highs) - middle) / half, nan=0.0).clip(-1, 1)
        rows = np.concatenate([np.ones((len(units), 1)), units, units**2], axis=1)
        # A row is a contribution, or its share of its client's.
        weights = np.ones(len(rows)) if self.unit == "example" else 1.0 / np.bincount(owners)[owners]
        total = {torch.float64: torch.from_numpy(weights @ rows)}
        std = self.noise_multiplier * self.sensitivity
        if self.insecure_test_seed is None:
            check_source()
        noisy = add_noise(total, std, SecureNoise(self.insecure_test_seed, "scaling"))
        check_added(total, noisy, std)
        count, *sums = noisy[torch.float64].tolist()
        means = np.clip(np.array(sums[: len(half)]) / max(count, 1.0), -1, 1)
        variances = np.array(sums[len(half) :]) / max(count, 1.0) - means**2
        stds = np.sqrt(np.clip(variances, MIN_STD**2, 1.0))
        fitted = zip(self.ranges, (middle + half * means).tolist(), (half * stds).tolist(), strict=True)
        release = ScalingRelease(secrets.token_hex(16), float(self.noise_multiplier), self.unit)
        return {column: (mean, deviation) for column, mean, deviation in fitted}, release
