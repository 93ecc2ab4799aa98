"""MNIST-1D: digits as generated signals of 40 values."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, TensorDataset

from lightning_fl.datamodules.central import CentralDataModule
from lightning_fl.datamodules.datasets.sklearn_data import check_test_share

# The shape of each digit as 12 values, from the paper's appendix.
_SHAPES = (
    "5 6 6.5 6.75 7 7 7 7 6.75 6.5 6 5",
    "5 3 3 3.4 3.8 4.2 4.6 5 5.4 5.8 5 5",
    "5 6 6.5 6.5 6 5.25 4.75 4 3.5 3.5 4 5",
    "5 6 6.5 6.5 6 5 5 6 6.5 6.5 6 5",
    "5 4.4 3.8 3.2 2.6 2.6 5 5 5 5 5 5",
    "5 3 3 3 3 5 6 6.5 6.5 6 4.5 5",
    "5 4 3.5 3.25 3 3 3 3 3.25 3.5 4 5",
    "5 7 7 6.6 6.2 5.8 5.4 5 4.6 4.2 5 5",
    "5 4 3.5 3.5 4 5 5 4 3.5 3.5 4 5",
    "5 4 3.5 3.5 4 5 5 5 5 4.7 4.3 5",
)
_LENGTH, _SHORTEST, _NUM_VALUES = 72, 48, 40


class MNIST1DDataModule(CentralDataModule):
    """MNIST-1D: 4,000 + 1,000 signals of 40 values, each a digit's outline, stretched, shifted, sheared and noisy.

    Signals are float32 of shape ``[40]`` with mean 0 and variance 1 over all signals; labels are 0 to 9. They are
    generated as in the paper but with different random numbers, so they differ from the signals in the paper's file.

    Args:
        num_samples: Number of signals, a multiple of 10.
        batch_size: Examples per training batch.
        test_share: Fraction of the signals held out for testing, in (0, 1).
        **kwargs: ``val_share``, ``seed`` (also of the signals), ``num_workers`` and ``eval_batch_size``; see
            :class:`CentralDataModule`.

    Raises:
        ValueError: If an argument is out of range.

    References:
        Greydanus, Kobak, *Scaling Down Deep Learning with MNIST-1D*, 2024, arXiv:2011.14439.
    """

    def __init__(self, num_samples: int = 5000, batch_size: int = 32, test_share: float = 0.2, **kwargs: Any) -> None:
        super().__init__(batch_size=batch_size, **kwargs)
        if num_samples < 20 or num_samples % 10:
            raise ValueError(f"num_samples={num_samples} must be a multiple of 10, at least 20.")
        self.num_samples = num_samples
        self.test_share = check_test_share(test_share)

    def read(self) -> tuple[Dataset, Dataset]:
        """Generates the signals."""
        rng = np.random.default_rng(self.seed)
        labels = rng.permutation(np.repeat(np.arange(10), self.num_samples // 10))
        shapes = np.array([[float(value) for value in line.split()] for line in _SHAPES])
        shapes = (shapes - shapes.mean(axis=1, keepdims=True)) / shapes.std(axis=1, keepdims=True)
        shapes = (shapes - shapes[:, :1]) / 6
        signals = np.stack([_signal(shapes[label], rng) for label in labels])
        signals = (signals - signals.mean()) / signals.std()
        x, y = torch.from_numpy(signals.astype(np.float32)), torch.from_numpy(labels)
        num_train = round(self.num_samples * (1 - self.test_share))
        return TensorDataset(x[:num_train], y[:num_train]), TensorDataset(x[num_train:], y[num_train:])


def _signal(shape: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    length = rng.integers(_SHORTEST, _LENGTH + 1)
    padded = np.zeros(length)
    padded[: len(shape)] = shape
    signal = _resample(padded, _LENGTH) * (1 + 0.4 * (rng.random() - 0.5))
    signal = np.roll(signal, rng.integers(48))
    blur = np.exp(-0.5 * (np.arange(-8, 9) / 2) ** 2)
    noise = 0.25 * np.convolve(np.pad(rng.standard_normal(_LENGTH), 8, "symmetric"), blur / blur.sum(), "valid")
    signal = np.where(signal == 0, noise, signal) + 0.02 * rng.standard_normal(_LENGTH)
    signal = signal - 0.75 * (rng.random() - 0.5) * np.linspace(-0.5, 0.5, _LENGTH)
    return _resample(signal, _NUM_VALUES)


def _resample(signal: np.ndarray, length: int) -> np.ndarray:
    return np.interp(np.linspace(0, 1, length), np.linspace(0, 1, len(signal)), signal)
