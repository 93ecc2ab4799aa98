"""Samplers for a part of a data set: a loader's own sampler, restricted to one client's samples."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)


def index_sampler(loader: DataLoader) -> Any:
    """The sampler that yields the indices of single examples; a plain ``BatchSampler`` is unwrapped."""
    for batches in (loader.batch_sampler, loader.sampler):
        if type(batches) is BatchSampler:
            return batches.sampler
    return loader.sampler


def is_plain(sampler: Any, num_samples: int) -> bool:
    """Whether a sampler reads each sample once, in order or shuffled by torch."""
    if type(sampler) not in (RandomSampler, SequentialSampler) or getattr(sampler, "replacement", False):
        return False
    return len(sampler) == num_samples


def can_split(sampler: Any, num_samples: int) -> bool:
    """Whether :func:`sampler_of_part` can restrict a sampler to a part of the samples."""
    kind = type(sampler)
    if kind is SubsetRandomSampler:
        return True
    if kind in (RandomSampler, WeightedRandomSampler):
        return len(sampler.data_source if kind is RandomSampler else sampler.weights) == num_samples
    # As many as there are samples: it is assumed to be a permutation, which is checked when it is drawn.
    return hasattr(sampler, "__len__") and len(sampler) == num_samples and not hasattr(sampler, "num_replicas")


def num_drawn(sampler: Any, num_samples: int, part: Any) -> int:
    """Number of examples that one pass over a part of the data set draws.

    Args:
        sampler: The sampler of the whole data set.
        num_samples: The size of the data set.
        part: The indices of the part.
    """
    if type(sampler) is SubsetRandomSampler:
        return int(np.isin(np.asarray(part), np.asarray(sampler.indices)).sum())
    if type(sampler) not in (RandomSampler, WeightedRandomSampler) or not len(part):
        return len(part)
    drawn = max(1, round(len(sampler) * len(part) / num_samples))
    if type(sampler) is RandomSampler:
        return drawn
    positive = int((sampler.weights[torch.as_tensor(part)] > 0).sum())
    return min(drawn, positive) if not positive or not sampler.replacement else drawn


def sampler_of_part(sampler: Any, dataset: Any, part: Sequence[int]) -> Sampler[int]:
    """A sampler of the positions ``0 .. len(part)-1`` that draws like ``sampler``.

    Args:
        sampler: The sampler of the whole data set.
        dataset: The whole data set.
        part: The indices of the part.
    """
    kind, size = type(sampler), num_drawn(sampler, len(dataset), part)
    positions = range(len(part))
    if not size or kind is SequentialSampler:
        return SequentialSampler(positions[:size])
    if kind is RandomSampler:
        return RandomSampler(positions, sampler.replacement, size, sampler.generator)
    if kind is WeightedRandomSampler:
        return WeightedRandomSampler(
            sampler.weights[torch.as_tensor(part)],
            size,
            sampler.replacement,
            sampler.generator,
        )
    if kind is SubsetRandomSampler:
        chosen = np.flatnonzero(np.isin(np.asarray(part), np.asarray(sampler.indices))).tolist()
        return SubsetRandomSampler(chosen, sampler.generator)
    return PartOfPermutation(sampler, dataset, part)


class PartOfPermutation(Sampler[int]):
    """The samples of one client in the order in which a user's own sampler draws them.

    The sampler is a copy, and its own generators are seeded from torch's, which is seeded by client: so its draws for
    one client do not depend on which clients were trained before.

    Args:
        sampler: A sampler that yields each index of ``dataset`` once.
        dataset: The whole data set.
        part: The indices of the client's samples.
    """

    def __init__(self, sampler: Any, dataset: Any, part: Sequence[int]) -> None:
        self.sampler = copy.deepcopy(sampler, {id(dataset): dataset})  # the data set is shared
        self.num_samples = len(dataset)
        self.position = {int(index): position for position, index in enumerate(part)}

    def set_epoch(self, epoch: int) -> None:
        """Passes the number of the pass on to the sampler, if it takes one."""
        if callable(getattr(self.sampler, "set_epoch", None)):
            self.sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.position)

    def __iter__(self) -> Iterator[int]:
        _seed_own_generators(self.sampler)
        order = [int(index) for index in self.sampler]
        if len(order) != self.num_samples or len(set(order)) != self.num_samples:
            raise ValueError(
                f"The sampler {type(self.sampler).__name__} draws {len(set(order))} different samples out of "
                f"{self.num_samples} in {len(order)} draws; to be split among clients it must draw each once. "
                f"{REMEDY}"
            )
        return iter([self.position[index] for index in order if index in self.position])


REMEDY = (
    "Create one per client: fl.datamodules.PartitionedDataModule(..., sampler=lambda dataset: MySampler(dataset)), "
    "or batch_sampler=; or give each client its own loader with fl.datamodules.ClientLoaders."
)


def _seed_own_generators(sampler: Any) -> None:
    for name, value in vars(sampler).items():
        if not isinstance(value, torch.Generator | np.random.Generator | np.random.RandomState | random.Random):
            continue
        seed = int(torch.empty((), dtype=torch.int64).random_())
        if isinstance(value, torch.Generator):
            value.manual_seed(seed)
        elif isinstance(value, random.Random):
            value.seed(seed)
        else:
            is_new = isinstance(value, np.random.Generator)
            setattr(sampler, name, np.random.default_rng(seed) if is_new else np.random.RandomState(seed % 2**32))
