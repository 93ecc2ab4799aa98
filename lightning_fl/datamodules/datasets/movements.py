"""Synthetic signals of a sensor that people wear, each in their own way."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.utils.data import TensorDataset

from lightning_fl.datamodules.natural import ClientData, NaturalDataModule
from lightning_fl.seeding import derive_seed

KINDS = 4


class MovementsDataModule(NaturalDataModule):
    r"""Synthetic windows of a three-axis sensor during one of four movements; each person is a client.

    The movements are a sine wave, a rectified sine wave, a square wave and a sum of two tones. Each person has a tempo,
    an amplitude, a noise level and a sensor orientation, so that people differ more than movements do. Samples are
    float32 ``[3, length]``, labels int64. A person's windows are generated from the seed and the person's number when
    they are needed.

    Args:
        num_clients: Number of people.
        windows: Number of windows per person.
        length: Number of time steps in a window.
        batch_size: Examples per training batch.
        test_share: Fraction of each person's windows held out for test, in [0, 1).
        **kwargs: ``val_share``, ``seed`` (also of the data), ``num_workers`` and ``eval_batch_size``; see
            :class:`NaturalDataModule`.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        num_clients: int = 12,
        windows: int = 80,
        length: int = 64,
        batch_size: int = 16,
        test_share: float = 0.25,
        **kwargs: Any,
    ) -> None:
        super().__init__(batch_size=batch_size, test_share=test_share, **kwargs)
        if num_clients < 1 or windows < 2 or length < 16:
            raise ValueError(
                f"num_clients={num_clients}, windows={windows}, length={length}: expected at least 1, 2 and 16."
            )
        self.num_clients = num_clients
        self.windows = windows
        self.length = length

    def read(self) -> ClientData:
        """The people and their windows."""
        return ClientData(range(self.num_clients), lambda client: self.windows, self._make)

    def _make(self, client: int) -> TensorDataset:
        rng = np.random.default_rng(derive_seed(self.seed, client, "movements"))
        tempo, strength, noise = rng.uniform(2.0, 5.0), rng.uniform(0.5, 2.0), rng.uniform(0.2, 0.5)
        worn = np.linalg.qr(rng.normal(size=(3, 3)))[0][:, :1]
        labels = rng.integers(0, KINDS, self.windows)
        phase = 2 * np.pi * (tempo * np.arange(self.length) / self.length + rng.uniform(size=(self.windows, 1)))
        waves = np.stack(
            [np.sin(phase), np.abs(np.sin(phase)), np.sign(np.sin(phase)), (np.sin(phase) + np.sin(3 * phase)) / 2]
        )
        signal = strength * waves[labels, np.arange(self.windows)]
        values = signal[:, None, :] * worn + noise * rng.normal(size=(self.windows, 3, self.length))
        return TensorDataset(torch.from_numpy(values.astype(np.float32)), torch.from_numpy(labels))
