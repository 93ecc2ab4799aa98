"""Loaders that give all parties the same rows in the same order."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler


class SharedOrder(Sampler[int]):
    """The order of the rows in each epoch, the same for all parties: drawn from (seed, epoch).

    Args:
        ids: The ids of the rows, in their order, of which parties compare a hash.
        seed: The parties' common seed.
        shuffle: Whether each epoch has an order of its own.
    """

    def __init__(self, ids: Sequence[Any], seed: int, shuffle: bool) -> None:
        self.size, self.seed, self.shuffle = len(ids), seed, shuffle
        content = hashlib.sha256()
        for name in ids:
            encoded = str(name).encode()
            content.update(len(encoded).to_bytes(8, "little") + encoded)
        self.digest = content.digest()
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch; Lightning calls it."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        if not self.shuffle:
            return iter(range(self.size))
        seed = hashlib.sha256(f"{self.seed}/{self.epoch}".encode()).digest()[:8]
        generator = torch.Generator().manual_seed(int.from_bytes(seed, "little") >> 1)
        return iter(torch.randperm(self.size, generator=generator).tolist())


def aligned_loader(
    dataset: Dataset, ids: Sequence[Any], batch_size: int, shuffle: bool = False, seed: int = 0, **options: Any
) -> DataLoader:
    """A loader whose batches hold the same rows as those of the other parties.

    Args:
        dataset: This party's columns, one example a row.
        ids: The id of each row: what ``psi`` has aligned. Parties compare a hash of them, and of their order.
        batch_size: Rows in a batch; the same at all parties.
        shuffle: Whether each epoch has an order of its own, from ``seed``.
        seed: The same at all parties.
        **options: Of the ``DataLoader``.

    Raises:
        ValueError: If there are not as many ids as examples.
    """
    size = len(dataset)  # type: ignore[arg-type]
    if size != len(ids):
        raise ValueError(f"There are {len(ids)} ids for {size} examples; expected one each.")
    return DataLoader(dataset, batch_size, sampler=SharedOrder(ids, seed, shuffle), **options)
