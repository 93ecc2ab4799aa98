"""A split within each client: some of its samples are held out for its own validation and test."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np

from lightning_fl.seeding import derive_seed
from lightning_fl.types import ClientId

Part = Literal["train", "val", "test"]


class Holdout(NamedTuple):
    """Fractions of each client's samples that are held out for its own validation and test, each in [0, 1)."""

    val_share: float = 0.0
    test_share: float = 0.0

    def check(self) -> None:
        """Checks that the fractions are in range.

        Raises:
            ValueError: If one is negative, or they leave nothing for training.
        """
        if min(self) < 0 or sum(self) >= 1:
            raise ValueError(
                f"val_share={self.val_share} and test_share={self.test_share} must be at least 0 and sum to less than "
                "1: the rest of each client's samples is for training."
            )

    def size(self, num_samples: int, part: Part) -> int:
        """Number of a client's samples in a part: rounded, but at least one sample is left for training."""
        num_val = min(int(num_samples * self.val_share + 0.5), max(num_samples - 1, 0))
        num_test = min(int(num_samples * self.test_share + 0.5), max(num_samples - 1 - num_val, 0))
        return {"train": num_samples - num_val - num_test, "val": num_val, "test": num_test}[part]

    def indices(self, num_samples: int, part: Part, seed: int, client: ClientId) -> np.ndarray:
        """Sorted positions of a client's samples in a part; the three parts are disjoint and cover all samples."""
        if sum(self) == 0:
            return np.arange(num_samples if part == "train" else 0)
        # Seeded by client, so that a client's parts do not depend on which others there are.
        order = np.random.default_rng(derive_seed(seed, "holdout", client)).permutation(num_samples)
        num_train, num_val = self.size(num_samples, "train"), self.size(num_samples, "val")
        pieces = np.split(order, [num_train, num_train + num_val])
        return np.sort(pieces[("train", "val", "test").index(part)])
