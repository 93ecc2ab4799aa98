"""Forecasts the shapes of a client's batches without reading them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import BatchSampler, DataLoader

from lightning_fl.data.client_loaders import Loader, count_examples
from lightning_fl.engines.vectorized.stacking import signature


@dataclass(frozen=True)
class BatchForecast:
    """What is known about a client's batches before they are read.

    Args:
        family: Only clients with equal values can train together.
        work: The signature or size of each of its batches in the round.
        segments: The number of batches of each segment; gradients do not accumulate across segments.
    """

    family: Any
    work: tuple[Any, ...]
    segments: tuple[int | None, ...]


def forecast_batches(loader: Loader, segments: Sequence[int | None], pass_length: int | None) -> BatchForecast | None:
    """The forecast for a client, or None if its batches must be read first.

    Args:
        loader: The client's loader.
        segments: The number of batches of each segment of its training; each starts with the loader's first batch.
        pass_length: The number of batches in a pass over the loader.
    """
    family: Any
    if pass_length is None or None in segments:
        return None
    if isinstance(loader, DataLoader):
        sampler: Any = loader.batch_sampler
        # A subclass may yield batches of any size.
        if type(sampler) is not BatchSampler:
            return None
        size = family = sampler.batch_size
        num_left = (count_examples(loader) or 0) % size
        own = [size] * (len(loader) - 1) + [num_left or size]
    elif isinstance(loader, Sequence) and len(loader):
        family = "in memory"
        try:
            # Only the first and last batches are examined, since examining each would read all data. If others differ,
            # the group is split once its batches have been read.
            own = [signature(loader[0])] * (len(loader) - 1) + [signature(loader[-1])]
        except Exception:  # raised again, with the client named, when the loader is read
            return None
    else:
        return None
    work = (own[index % pass_length] for length in segments for index in range(length or 0))
    return BatchForecast(family, tuple(work), tuple(segments))
