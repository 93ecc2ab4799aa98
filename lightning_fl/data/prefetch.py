"""Prefetching: the workers of a client's loader start reading while another client is still training."""

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

# They use the global generator only at the start of a pass, so prefetching can't disturb the client that is training.
_SAMPLERS = (RandomSampler, SequentialSampler, SubsetRandomSampler, WeightedRandomSampler)


class PrefetchedLoader:
    """A ``DataLoader`` whose workers already read its first pass.

    The prefetched iterator is used only if the random state equals that at its creation; the random state afterwards is
    then set as creating it would have left it. Any other pass is read as usual, so results do not change.

    Args:
        loader: A loader for which :func:`can_prefetch` holds. The random generators must be in the state that they will
            have at the start of its client's turn.
    """

    def __init__(self, loader: DataLoader) -> None:
        self.loader = loader
        self.generator = loader.generator
        self.sampler = loader.sampler
        self.batch_sampler = loader.batch_sampler
        self._generators = [torch.default_generator, *loader_generators(loader)]
        self._states_before = self._states()
        self._prefetched: Iterator[Any] | None = iter(loader)
        self._states_after = self._states()

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        prefetched = self._prefetched
        if prefetched is None or not all(map(torch.equal, self._states(), self._states_before)):
            return iter(self.loader)
        self._prefetched = None
        for generator, state in zip(self._generators, self._states_after, strict=True):
            generator.set_state(state)
        return prefetched

    def _states(self) -> list[torch.Tensor]:
        return [generator.get_state() for generator in self._generators]


def can_prefetch(loader: Any) -> TypeGuard[DataLoader]:
    """Whether a loader has workers, and draws random numbers only at the start of a pass or from its own generators."""
    return (
        type(loader) is DataLoader
        and loader.num_workers > 0
        # With persistent workers every iter() resets the same iterator, which would discard a prefetched pass.
        and not loader.persistent_workers
        and not isinstance(loader.dataset, IterableDataset)
        and type(loader.batch_sampler) is BatchSampler
        and type(loader.batch_sampler.sampler) in _SAMPLERS
    )
