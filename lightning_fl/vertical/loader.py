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
        ids: The ids of the rows, in their order; parties compare a hash of them.
        seed: The parties' common seed.
        shuffle: Whether to shuffle the rows in each epoch.
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
        dataset: This party's columns, one example per row.
        ids: The id of each row, as aligned by ``psi``. Parties compare a hash of the ids and their order.
        batch_size: Number of rows in a batch; the same at all parties.
        shuffle: Whether to shuffle the rows in each epoch, by ``seed``. Default False.
        seed: Seed of the order; the same at all parties. Default 0.
        **options: Further arguments of ``DataLoader``.

    Raises:
        ValueError: If the numbers of ids and examples differ.
    """
    size = len(dataset)  # type: ignore[arg-type]
    if size != len(ids):
        raise ValueError(f"There are {len(ids)} ids for {size} examples; expected one per example.")
    return DataLoader(dataset, batch_size, sampler=SharedOrder(ids, seed, shuffle), **options)
