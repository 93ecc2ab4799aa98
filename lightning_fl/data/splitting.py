"""Splits one DataLoader into the loaders of many clients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler, Subset

from lightning_fl.data.client_loaders import ClientLoaders
from lightning_fl.data.collation import with_fast_collation
from lightning_fl.data.partitioners.partitioner import Partitioner
from lightning_fl.types import ClientId

_REMEDY = "Give each client its own loader with fl.datamodules.ClientLoaders or fl.datamodules.ClientDatasets."


def check_splittable(loader: Any) -> None:
    """Checks that a loader can be split among clients.

    Args:
        loader: Must be one plain ``DataLoader`` over a map-style data set that batches automatically, in order or
            shuffled.

    Raises:
        ValueError: If it is anything else.
    """
    # A subclass that iterates in a way of its own would lose that when its loader is made anew for each client.
    if not isinstance(loader, DataLoader) or type(loader).__iter__ is not DataLoader.__iter__:
        raise ValueError(
            f"The training loader is a {type(loader).__name__}; only one plain DataLoader can be split among clients. "
            f"{_REMEDY}"
        )
    dataset, batch_sampler = loader.dataset, loader.batch_sampler
    sampler: Any = loader.sampler
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise ValueError(
            f"The training loader reads {type(dataset).__name__}, a stream; only a map-style data set with a length "
            f"can be split among clients. {_REMEDY}"
        )
    if batch_sampler is not None and loader.batch_size is None:
        raise ValueError(
            f"The training loader has the custom batch_sampler {type(batch_sampler).__name__}; to be split among "
            f"clients it must form its batches from `batch_size` and `drop_last`. {_REMEDY}"
        )
    custom = type(sampler) not in (RandomSampler, SequentialSampler) or len(sampler) != len(dataset)
    if custom or getattr(sampler, "replacement", False):
        raise ValueError(
            f"The training loader has the custom sampler {type(sampler).__name__}, which draws {_size(sampler)} of "
            f"{len(dataset)} samples; to be split among clients it must read each sample once, in order or with "
            f"`shuffle=True`. {_REMEDY}"
        )


def split_loader(
    loader: DataLoader,
    parts: Sequence[Tensor],
    ids: Sequence[ClientId] | None = None,
    make_dataset: Callable[[int, Tensor], Dataset] | None = None,
) -> ClientLoaders:
    """Splits a loader among clients: each client's loader reads its part of the data set.

    The clients' loaders are created when they are looked up. They keep the batch size, shuffling, collation, workers
    and generator (the same object) of ``loader``; their workers are not persistent.

    Args:
        loader: A plain ``DataLoader`` over a map-style data set.
        parts: For each client the indices of its samples, shape ``[num_samples_of_client]``, possibly empty.
        ids: The clients' ids. None: ``0 .. len(parts)-1``.
        make_dataset: Creates a client's data set from its position and its part. None: a ``Subset``.

    Raises:
        ValueError: If the loader cannot be split, see :func:`check_splittable`.
    """
    check_splittable(loader)
    size = loader.batch_size
    clients = range(len(parts)) if ids is None else ids
    position = (
        # A range finds a position without a dict of all clients, of which there may be a million.
        clients.index if isinstance(clients, range) else {client: i for i, client in enumerate(clients)}.__getitem__
    )
    make = make_dataset or (lambda _, part: Subset(loader.dataset, part.tolist()))
    return ClientLoaders(
        clients,
        lambda client: _rebuild(loader, make(position(client), parts[position(client)])),
        num_examples=None
        if size is None
        else lambda client: examples_per_pass(len(parts[position(client)]), size, loader.drop_last),
    )


def partition_loader(
    loader: DataLoader, partitioner: Partitioner, num_clients: int | None = None, seed: int = 0
) -> ClientLoaders:
    """Splits a loader among clients by a partitioner.

    Args:
        loader: A plain ``DataLoader`` over a map-style data set.
        partitioner: Assigns the samples to clients.
        num_clients: Number of clients. None: the partitioner's default.
        seed: Seed of the partition.

    Raises:
        ValueError: If the loader cannot be split, or the data set cannot be partitioned.
    """
    check_splittable(loader)
    dataset = loader.dataset
    parts = partitioner(dataset, num_clients, seed)
    return split_loader(
        loader,
        parts,
        partitioner.client_ids(dataset, num_clients),
        lambda client, part: partitioner.client_dataset(dataset, part, client, len(parts), seed),
    )


def in_order(loader: Any) -> Any:
    """An unshuffled ``DataLoader`` over the same data; a loader that is not shuffled is returned as it is."""
    if not isinstance(loader, DataLoader) or not isinstance(loader.sampler, RandomSampler):
        return loader
    return _rebuild(loader, loader.dataset, shuffle=False)


def shard(loader: Any, rank: int, size: int) -> DataLoader:
    """The part of an evaluation loader that one rank reads; no sample is repeated to make the parts equal.

    Args:
        loader: A plain ``DataLoader`` over a map-style data set.
        rank: The rank, ``0 .. size-1``.
        size: Number of ranks.

    Raises:
        ValueError: If the loader cannot be split, or has fewer samples than there are ranks.
    """
    check_splittable(loader)
    if len(loader.dataset) < size:
        raise ValueError(
            f"split_validation=True can't split {len(loader.dataset)} samples among {size} ranks; set it to False."
        )
    # Not a `DistributedSampler`, which repeats samples to make the ranks equal and so changes the metrics.
    return _rebuild(loader, Subset(loader.dataset, range(rank, len(loader.dataset), size)))


def examples_per_pass(num_samples: int, batch_size: int, drop_last: bool) -> int:
    """Number of examples that one pass over a loader yields."""
    return num_samples // batch_size * batch_size if drop_last else num_samples


def with_dataset(loader: DataLoader, dataset: Any, evaluate: bool = False) -> DataLoader:
    """A copy of a loader that reads another data set; for evaluation, every sample once and in order."""
    return _rebuild(loader, dataset, shuffle=False, drop_last=False) if evaluate else _rebuild(loader, dataset)


def _rebuild(
    loader: DataLoader, dataset: Any, shuffle: bool | None = None, drop_last: bool | None = None
) -> DataLoader:
    """A copy of a loader over ``dataset``; None keeps the loader's setting."""
    dataset, collate_fn = with_fast_collation(dataset, loader.collate_fn)
    sampler_generator = getattr(loader.sampler, "generator", None)
    return DataLoader(
        dataset,
        batch_size=loader.batch_size,
        # RandomSampler refuses an empty data set, which a client may have
        shuffle=isinstance(loader.sampler, RandomSampler) and len(dataset) > 0 if shuffle is None else shuffle,
        num_workers=loader.num_workers,
        collate_fn=collate_fn,
        pin_memory=loader.pin_memory,
        drop_last=loader.drop_last if drop_last is None else drop_last,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        # The new loader makes its own sampler, which gets only this generator; that of the old sampler would be lost.
        generator=loader.generator if loader.generator is not None else sampler_generator,
        prefetch_factor=loader.prefetch_factor,
        persistent_workers=False,  # they would pile up, one set per client
        in_order=loader.in_order,
    )


def _size(sampler: Any) -> str:
    """What a sampler draws, for an error message."""
    replaced = " with replacement" if getattr(sampler, "replacement", False) else ""
    return f"{len(sampler) if hasattr(sampler, '__len__') else '?'}{replaced}"
