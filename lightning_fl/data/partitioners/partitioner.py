"""The interface of partitioners, which split one data set among simulated clients."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, Subset

from lightning_fl.types import ClientId

DEFAULT_NUM_CLIENTS = 10
_STREAM = 0x5117  # keeps the split independent of other generators with the same seed


class Partitioner(ABC):
    """Splits a data set among clients: every sample goes to exactly one of them.

    Subclasses override :meth:`split` and take all their randomness from its ``rng``.
    """

    names_clients: bool = False
    """Whether the data names the clients, so that ``num_clients`` is not needed."""

    changes_examples: bool = False
    """Whether :meth:`client_dataset` changes examples, such as by adding noise."""

    def __call__(self, dataset: Any, num_clients: int | None = None, seed: int = 0) -> list[torch.Tensor]:
        """Splits ``dataset`` among ``num_clients`` clients; the same arguments always give the same split.

        Args:
            dataset: A map-style data set.
            num_clients: Number of clients, at least 1 and at most the number of samples. None: the clients that the
                data names, or 10.
            seed: Seed of the split, at least 0.

        Returns:
            For each client the indices of its samples: int64, sorted, shape ``[num_samples_of_client]``.

        Raises:
            ValueError: If the data set has no length, the number of clients does not fit it, or :meth:`split` omits a
                sample, assigns one twice or gives another number of parts.
        """
        if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            raise ValueError(
                f"{type(dataset).__name__} cannot be partitioned: expected a map-style data set with a length. Give "
                "each client its own loader with fl.datamodules.ClientLoaders."
            )
        # A number below 1 is left unchanged, for the error that follows.
        if num_clients is None or num_clients > 0:
            num_clients = len(self.client_ids(dataset, num_clients))
        if not 1 <= num_clients <= len(dataset):
            raise ValueError(
                f"num_clients={num_clients} does not fit a data set of {len(dataset)} samples: it must be at least 1 "
                "and at most the number of samples. Change num_clients or use more data."
            )
        parts = self.split(dataset, num_clients, np.random.default_rng([seed, _STREAM]))
        if len(parts) != num_clients:
            raise ValueError(
                f"{self} gave {len(parts)} parts for {num_clients} clients; `split` must give one part per client. "
                "If the data defines the clients, override `client_ids` too."
            )
        owner = _owners(parts, len(dataset), str(self))
        # a stable argsort of the owners groups the samples by client and keeps each client's samples sorted
        ends = np.cumsum(np.bincount(owner, minlength=num_clients))[:-1]
        return list(torch.from_numpy(np.argsort(owner, kind="stable")).tensor_split(torch.from_numpy(ends)))

    def client_ids(self, dataset: Any, num_clients: int | None = None) -> Sequence[ClientId]:
        """The clients' ids in the order of the parts: ``0 .. num_clients-1`` unless the data names them."""
        return range(DEFAULT_NUM_CLIENTS if num_clients is None else num_clients)

    def client_dataset(self, dataset: Any, part: torch.Tensor, client: int, num_clients: int, seed: int) -> Dataset:
        """A client's data set.

        Args:
            dataset: The data set that was split.
            part: The indices of the client's samples, or of some of them, such as those held out for validation.
            client: The client's position, ``0 .. num_clients-1``.
            num_clients: Number of clients.
            seed: Seed of the split.
        """
        return Subset(dataset, part.tolist())

    @abstractmethod
    def split(self, dataset: Any, num_clients: int, rng: np.random.Generator) -> Sequence[np.ndarray]:
        """The clients' sample indices, in any order.

        Args:
            dataset: A map-style data set with at least ``num_clients`` samples.
            num_clients: Number of clients, at least 1.
            rng: The only source of randomness.
        """


@dataclass(frozen=True)
class IID(Partitioner):
    """Random samples for each client; the clients' sizes differ by at most 1."""

    def split(self, dataset: Any, num_clients: int, rng: np.random.Generator) -> Sequence[np.ndarray]:
        """See :meth:`Partitioner.split`."""
        return np.array_split(rng.permutation(len(dataset)), num_clients)


def _owners(parts: Sequence[np.ndarray], num_samples: int, name: str) -> np.ndarray:
    """The client of each sample, int64 of shape ``[num_samples]``; checks that every sample has exactly one."""
    samples = np.concatenate([np.asarray(part, dtype=np.int64) for part in parts])
    inside = samples[(samples >= 0) & (samples < num_samples)]
    counts = np.bincount(inside, minlength=num_samples)
    if len(inside) != len(samples) or (counts != 1).any():
        raise ValueError(
            f"{name} assigned {(counts == 0).sum()} of {num_samples} samples to no client, {(counts > 1).sum()} more "
            f"than once, and {len(samples) - len(inside)} that do not exist; every sample must go to exactly one "
            "client. Fix its split()."
        )
    owner = np.empty(num_samples, dtype=np.int64)
    owner[samples] = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    return owner
