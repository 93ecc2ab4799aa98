"""A client's data, read by its loader's workers while another client still trains."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeGuard

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning_fl.seeding import loader_generators

_SAMPLERS = (RandomSampler, SequentialSampler, SubsetRandomSampler, WeightedRandomSampler)


class PrefetchedLoader:
    """A ``DataLoader`` whose workers have begun with its first pass.

    The pass that is begun with the random numbers drawn from where it was opened gets what they have read; every other
    pass is read anew. So all random numbers are those of a loader that was not opened ahead.

    Args:
        loader: A loader for which :func:`can_prefetch` holds; the random generators stand where its client's turn will
            find them.
    """

    def __init__(self, loader: DataLoader) -> None:
        self.loader = loader
        self.generator = loader.generator
        self.sampler = loader.sampler
        self.batch_sampler = loader.batch_sampler
        self._generators = [torch.default_generator, *loader_generators(loader)]
        self._before = self._states()
        self._opened: Iterator[Any] | None = iter(loader)
        self._after = self._states()

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        opened = self._opened
        if opened is None or not all(map(torch.equal, self._states(), self._before)):
            return iter(self.loader)
        self._opened = None
        for generator, state in zip(self._generators, self._after, strict=True):
            generator.set_state(state)
        return opened

    def _states(self) -> list[torch.Tensor]:
        return [generator.get_state() for generator in self._generators]


def can_prefetch(loader: Any) -> TypeGuard[DataLoader]:
    """Whether a loader has workers, and draws random numbers only when it is opened or from its own generators."""
    return (
        type(loader) is DataLoader
        and loader.num_workers > 0
        and not loader.persistent_workers
        and not isinstance(loader.dataset, IterableDataset)
        and type(loader.batch_sampler) is BatchSampler
        and type(loader.batch_sampler.sampler) in _SAMPLERS
    )
