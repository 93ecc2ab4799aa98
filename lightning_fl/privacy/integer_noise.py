"""Integer noise for differential privacy, from the operating system's randomness: discrete Gaussian and Skellam."""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import Decimal, localcontext
from fractions import Fraction
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lightning_fl.privacy.noise import SecureNoise

Mechanism = Literal["discrete_gaussian", "skellam"]
DOUBT = 1e-9
"""Uniform numbers this close to a probability are decided in exact arithmetic; float64 errs by less than 1e-12 here."""
MAX_VARIANCE = 1 << 52  # values of 40 deviations and their squares then keep float64's errors below DOUBT


class IntegerNoise:
    r"""A stream of integer samples with mean 0.

    ``discrete_gaussian`` is sampled exactly: the probability of k is proportional to :math:`e^{-k^2 / (2 \sigma^2)}`.
    Candidates from the discrete Laplace distribution are accepted by uniform numbers; if float64 can't decide on which
    side of the probability a number lies, more of its bits are drawn and compared in exact arithmetic.

    ``skellam``, the difference of two Poisson samples, has sums that are Skellam again. Its Poisson samples come from
    Hörmann's rejection method in float64, which changes probabilities by a share of about 1e-8 at a variance of 1e8.

    Args:
        insecure_test_seed: A seed that makes the samples reproducible; they then protect nothing.
        purpose: Separates streams of the same test seed.

    References:
        Canonne, Kamath and Steinke, "The Discrete Gaussian for Differential Privacy", NeurIPS 2020.
        Hörmann, "The transformed rejection method for generating Poisson random variables", 1993.
    """

    def __init__(self, insecure_test_seed: int | None = None, *purpose: int | str) -> None:
        self._source = SecureNoise(insecure_test_seed, "integers", *purpose)

    def sample(self, mechanism: Mechanism, size: int, variance: int) -> Tensor:
        r"""Draws independent samples.

        Args:
            mechanism: The distribution.
            size: Number of samples.
            variance: The variance; for the discrete Gaussian the parameter :math:`\sigma^2`, from which the variance
                differs by less than 1e-6 of it.

        Returns:
            An int64 tensor of shape ``(size,)`` on the CPU.

        Raises:
            ValueError: If the variance is not between 1 and 2^52.
        """
        if not 1 <= variance <= MAX_VARIANCE:
            raise ValueError(f"The variance {variance} of integer noise must be between 1 and 2^52.")
        draw = self._discrete_gaussian if mechanism == "discrete_gaussian" else self._skellam
        # More than needed, since candidates may be rejected; surplus samples are dropped independently of their values.
        parts, missing = [], size
        while missing > 0:
            parts.append(draw(missing + missing // 2 + 16, variance)[:missing])
            missing -= len(parts[-1])
        return torch.from_numpy(np.concatenate(parts) if parts else np.empty(0, dtype=np.int64))

    def uniform(self, size: int) -> Tensor:
        """Draws uniform samples in [0, 1), multiples of 2^-53; float64 of shape ``(size,)`` on the CPU."""
        return self._source.uniform(size)

    # ---- the discrete Gaussian

    def _discrete_gaussian(self, size: int, variance: int) -> np.ndarray:
        scale = math.isqrt(variance) + 1
        values = self._discrete_laplace(size, scale)
        # Accepted with probability exp(-(|x| - variance / scale)^2 / (2 variance)).
        sizes = np.abs(values)

        def exponent(index: int) -> Fraction:
            return (int(sizes[index]) - Fraction(variance, scale)) ** 2 / (2 * variance)

        approximate = (sizes - variance / scale) ** 2 / (2.0 * variance)
        return np.asarray(values[self._bernoulli_exp(approximate, exponent)])

    def _discrete_laplace(self, size: int, scale: int) -> np.ndarray:
        """Fewer than ``size`` samples with probabilities proportional to ``exp(-|x| / scale)``."""
        low = self._below(scale, size)
        low = low[self._bernoulli_exp(low / scale, lambda index: Fraction(int(low[index]), scale))]
        values = low + scale * self._geometric(len(low))
        is_negative = self._below(2, len(values)) == 1
        # Zero would count twice, once with each sign.
        return np.asarray(np.where(is_negative, -values, values)[~(is_negative & (values == 0))])

    def _geometric(self, size: int) -> np.ndarray:
        """The number of successes of a coin of probability 1/e before it fails."""
        counts, going = np.zeros(size, dtype=np.int64), np.arange(size)
        while len(going):
            going = going[self._bernoulli_exp(np.ones(len(going)), lambda index: Fraction(1))]
            counts[going] += 1
        return counts

    def _below(self, limit: int, size: int) -> np.ndarray:
        """Uniform integers from 0 to below ``limit``."""
        # Words beyond the last full multiple are drawn again, because they would favour small remainders.
        accepted = (1 << 63) - (1 << 63) % limit
        values = self._source.words(size) >> np.uint64(1)
        while (wrong := np.flatnonzero(values >= np.uint64(accepted))).size:
            values[wrong] = self._source.words(len(wrong)) >> np.uint64(1)
        return (values % np.uint64(limit)).astype(np.int64)

    def _bernoulli_exp(self, approximate: np.ndarray, exact: Callable[[int], Fraction]) -> np.ndarray:
        """For each exponent x, True with probability ``exp(-x)``.

        Args:
            approximate: The exponents in float64.
            exact: Returns an exponent by its index.
        """
        words = self._source.words(len(approximate))
        distance = np.exp(-approximate) - words * 2.0**-64
        success = distance > 0
        for index in np.flatnonzero(np.abs(distance) < DOUBT).tolist():
            success[index] = self._is_below_exp(int(words[index]), exact(index))
        return np.asarray(success)

    def _is_below_exp(self, word: int, exponent: Fraction) -> bool:
        """Whether a uniform number that begins with the 64 bits ``word`` lies below ``exp(-exponent)``."""
        bits = 64
        while True:
            with localcontext() as context:
                context.prec = bits // 2  # more than the digits of as many bits
                value = (-Decimal(exponent.numerator) / Decimal(exponent.denominator)).exp()
                low, high = Decimal(word) / (1 << bits), Decimal(word + 1) / (1 << bits)
                slack = value * Decimal(10) ** (8 - context.prec)
                if high <= value - slack:
                    return True
                if low >= value + slack:
                    return False
            word, bits = (word << 64) | int(self._source.words(1)[0]), bits + 64

    # ---- Skellam

    def _skellam(self, size: int, variance: int) -> np.ndarray:
        first, second = self._poisson(size, variance / 2), self._poisson(size, variance / 2)
        common = min(len(first), len(second))
        return first[:common] - second[:common]

    def _poisson(self, size: int, mean: float) -> np.ndarray:
        """Fewer than ``size`` Poisson samples."""
        from scipy.special import gammaln  # type: ignore[import-untyped, unused-ignore]

        if mean < 10:
            # By the cumulative probabilities, whose tail beyond the table is below 2^-53, the step of the uniforms.
            counts = np.arange(80)
            table = np.cumsum(np.exp(counts * math.log(mean) - mean - gammaln(counts + 1)))
            return np.searchsorted(table, self._source.uniform(size).numpy()).astype(np.int64)
        b = 0.931 + 2.53 * math.sqrt(mean)
        a = -0.059 + 0.02483 * b
        u = self._source.uniform(size).numpy() - 0.5
        v = 1.0 - self._source.uniform(size).numpy()
        us = 0.5 - np.abs(u)
        with np.errstate(divide="ignore", invalid="ignore"):
            k = np.floor((2 * a / us + b) * u + mean + 0.43)
            inverse_alpha = 1.1239 + 1.1328 / (b - 3.4)
            left = np.log(v * inverse_alpha / (a / us**2 + b))
            right = -mean + k * math.log(mean) - gammaln(k + 1)
            accepted = (us > 0) & (k >= 0) & (left <= right)
        return k[accepted].astype(np.int64)
