"""What the batches of a client will look like, as far as it shows without reading them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import BatchSampler, DataLoader

from lightning_fl.data.client_loaders import Loader, count_examples
from lightning_fl.engines.vectorized.stacking import signature


@dataclass(frozen=True)
class BatchForecast:
    """What is known of a client's batches before they are read.

    Args:
        family: What clients must have in common to train side by side.
        work: What its batches of the round look like, one after the other.
        segments: Numbers of batches between which gradients do not accumulate.
    """

    family: Any
    work: tuple[Any, ...]
    segments: tuple[int | None, ...]


def forecast_batches(loader: Loader, segments: Sequence[int | None], pass_length: int | None) -> BatchForecast | None:
    """The forecast for a client, or None if its batches have to be read to know.

    Args:
        loader: The client's.
        segments: Numbers of batches that it trains on; each begins with the loader's first.
        pass_length: Batches of a pass over the loader.
    """
    family: Any
    if isinstance(loader, DataLoader):
        sampler: Any = loader.batch_sampler
        if type(sampler) is not BatchSampler:
            return None
        size = family = sampler.batch_size
        num_left = (count_examples(loader) or 0) % size
        own = [size] * (len(loader) - 1) + [num_left or size]
    elif isinstance(loader, Sequence) and len(loader):
        family = "in memory"
        try:
            own = [signature(loader[0])] * (len(loader) - 1) + [signature(loader[-1])]
        except Exception:  # it will be raised, and its client named, when the loader is read
            return None
    else:
        return None
    if pass_length is None or None in segments:
        return None
    work = (own[index % pass_length] for length in segments for index in range(length or 0))
    return BatchForecast(family, tuple(work), tuple(segments))
