"""Noise for differential privacy: normal samples from a cipher whose key comes from the operating system."""

from __future__ import annotations

import hashlib
import math
import os
import warnings

import numpy as np
import torch
from torch import Tensor

from lightning_fl.tree import Flat, as_real

NUM_SUMMED = 2
CHUNK = 1 << 14
MAX_DEVIATIONS = 8.0


class PrivacyError(RuntimeError):
    """Raised if a condition of the privacy guarantee does not hold; the run stops."""


class InsecureNoiseWarning(UserWarning):
    """The noise comes from a test seed, so nothing about the run is private."""


def warn_of_test_seed() -> None:
    """Warns that a test seed makes a run NOT PRIVATE."""
    warnings.warn(
        "insecure_test_seed makes the noise predictable: this run is NOT PRIVATE. Use it in tests only.",
        InsecureNoiseWarning,
        stacklevel=3,
    )


class SecureNoise:
    """A stream of normal samples that ``seed_everything`` does not affect: AES-256-CTR, keyed by the operating system.

    Each sample is the sum of two independent Box-Muller normals divided by the square root of 2, in float64 from 53-bit
    uniforms. An attack that inverts a floating-point sampler then has to search two values at once (Holohan and
    Braghin, "Secure Random Sampling in Differential Privacy", ESORICS 2021). It is still floating-point arithmetic, for
    which the proof does not hold exactly: the gaps between floats depend on the value (Mironov, CCS 2012), the sum to
    which noise is added is itself rounded, and no sample lies beyond 12.1 standard deviations. An exact proof needs
    integer noise.

    Args:
        insecure_test_seed: A seed that makes the samples reproducible. They are then predictable and protect nothing.
        purpose: Separates streams of the same test seed.

    Raises:
        ImportError: If ``cryptography`` is not installed.
    """

    def __init__(self, insecure_test_seed: int | None = None, *purpose: int | str) -> None:
        try:
            from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
        except ImportError as error:
            raise ImportError(
                "Noise for privacy needs cryptography, which is not installed: pip install 'lightning-fl[privacy]'"
            ) from error
        if insecure_test_seed is None:
            # A key of its own for every stream, because the counter of each starts at 0.
            key = os.urandom(32)
        else:
            # With the purpose, or all streams of a test would hold the same noise.
            key = hashlib.sha256(repr((insecure_test_seed, *purpose)).encode()).digest()
        self._stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()

    def normal(self, size: int, std: float = 1.0) -> Tensor:
        """Draws independent samples from the normal distribution with mean 0.

        Args:
            size: Number of samples.
            std: Standard deviation.

        Returns:
            A float64 tensor of shape ``(size,)`` on the CPU.
        """
        samples = torch.empty(size, dtype=torch.float64)  # filled in chunks that stay in the processor's cache
        for chunk in samples.split(CHUNK):
            chunk.copy_(self._standard_normal(len(chunk)))
        return samples.mul_(std)

    def _standard_normal(self, size: int) -> Tensor:
        radius, angle = self.uniform(2 * NUM_SUMMED * size).view(2, NUM_SUMMED, size)
        radius = radius.neg_().add_(1.0).log_().mul_(-2.0 / NUM_SUMMED).sqrt_()  # 1 - u lies in (0, 1]
        return angle.mul_(2 * math.pi).cos_().mul_(radius).sum(0)

    def uniform(self, size: int) -> Tensor:
        """Draws uniform samples in [0, 1), multiples of 2^-53; float64 of shape ``(size,)`` on the CPU."""
        words = self.words(size) >> np.uint64(11)
        return torch.from_numpy(words.astype(np.float64)).mul_(2.0**-53)

    def words(self, size: int) -> np.ndarray:
        """Draws uniform integers of 64 bits; uint64 of shape ``[size]``."""
        return np.frombuffer(self._stream.update(bytes(8 * size)), dtype="<u8")


def check_source() -> None:
    """Checks that two fresh streams differ, as they must when the operating system's randomness works.

    Raises:
        PrivacyError: If they do not, so that noise would repeat.
    """
    if torch.equal(SecureNoise().normal(16), SecureNoise().normal(16)):
        raise PrivacyError("The noise repeats: two new streams gave the same samples. The run stops.")


def check_deviation(noise: Tensor, std: float) -> None:
    """Checks that noise has the standard deviation that the ledger records.

    Args:
        noise: The noise that was added.
        std: The standard deviation that is recorded.

    Raises:
        PrivacyError: If noise is missing, or its deviation can't be due to chance.
    """
    size = noise.numel()
    if not size or not std:
        return
    found = float((noise.double() / std).square().mean().sqrt())
    # The sample deviation of n normals has a relative standard error of 1 / sqrt(2 n).
    slack = MAX_DEVIATIONS / math.sqrt(2 * size)
    if not found > 0 or not 1 - slack <= found <= 1 + slack:
        raise PrivacyError(
            f"The noise added to {size} values has standard deviation {found * std:.6g}, but {std:.6g} is recorded. "
            "The run stops before anything is released. If the values are very large compared with the noise, rounding "
            "removes it: lower the clip, or train in float32 or float64."
        )


def add_noise(flat: Flat, std: float, source: SecureNoise) -> Flat:
    """Adds normal noise to flat tensors, in float64.

    Args:
        flat: One tensor per dtype; complex numbers count as pairs of real ones.
        std: Standard deviation of the noise on each number. 0: nothing is added.
        source: The stream that the noise is drawn from.
    """
    if not std:
        return flat
    noisy = {}
    for dtype, values in flat.items():
        real = as_real(values)
        noise = source.normal(real.numel(), std).to(real.device).view_as(real)
        # Rounded only after the addition: post-processing of the noisy value costs no privacy.
        result = (real.double() + noise).to(real.dtype)
        noisy[dtype] = torch.view_as_complex(result) if values.is_complex() else result
    return noisy


def check_added(before: Flat, after: Flat, std: float) -> None:
    """Checks that the noise added to flat tensors has the standard deviation that the ledger records.

    It compares the tensors after rounding to their dtype, so noise that was lost by rounding is detected.

    Raises:
        PrivacyError: If it has not.
    """
    added = [as_real(after[dtype]).double() - as_real(values).double() for dtype, values in before.items()]
    if added:
        check_deviation(torch.cat([noise.reshape(-1) for noise in added]), std)
