"""Splits one DataLoader into the loaders of many clients."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
)
from torch.utils.data.distributed import DistributedSampler

from lightning_fl.data.client_loaders import ClientLoaders
from lightning_fl.data.collation import with_fast_collation
from lightning_fl.data.partitioners.partitioner import Partitioner
from lightning_fl.data.samplers import REMEDY, can_split, index_sampler, is_plain, num_drawn, sampler_of_part
from lightning_fl.types import ClientId

_REMEDY = "Give each client its own loader with fl.datamodules.ClientLoaders or fl.datamodules.ClientDatasets."


def check_splittable(loader: Any, options: Mapping[str, Any] | None = None) -> None:
    """Checks that a loader can be split among clients.

    Args:
        loader: Must be one ``DataLoader`` over a map-style data set, with a sampler that can be restricted to a
            client's samples: one of torch's, or any that draws each sample once.
        options: Arguments of the clients' loaders that replace those of ``loader``.

    Raises:
        ValueError: If it is anything else.
    """
    dataset = _check_dataset(loader)
    if options and not options.keys().isdisjoint(_SAMPLERS):
        return
    batch_sampler, sampler = loader.batch_sampler, index_sampler(loader)
    whole = type(loader.sampler) is BatchSampler
    if type(batch_sampler) not in (BatchSampler, type(None)) or (
        isinstance(loader.sampler, BatchSampler) and not whole
    ):
        found = loader.sampler if batch_sampler is None else batch_sampler
        raise ValueError(
            f"The training loader has the custom batch_sampler {type(found).__name__}, which can't be restricted "
            f"automatically to a part of the samples. {REMEDY}"
        )
    if not can_split(sampler, len(dataset)):
        raise ValueError(
            f"The training loader has the custom sampler {type(sampler).__name__}, which draws {_size(sampler)} of "
            f"{len(dataset)} samples; to be split among clients it must be one of torch's, or draw each sample once. "
            f"{REMEDY}"
        )


def check_plain(loader: Any) -> None:
    """Checks that a loader batches automatically and reads each sample once, in order or shuffled.

    Raises:
        ValueError: If it does not.
    """
    dataset, sampler = _check_dataset(loader), loader.sampler
    if loader.batch_sampler is not None and loader.batch_size is None:
        raise ValueError(
            f"The training loader has the custom batch_sampler {type(loader.batch_sampler).__name__}; it must form its "
            f"batches from `batch_size` and `drop_last`. {_REMEDY}"
        )
    if not is_plain(sampler, len(dataset)):
        raise ValueError(
            f"The training loader has the custom sampler {type(sampler).__name__}, which draws {_size(sampler)} of "
            f"{len(dataset)} samples; it must read each sample once, in order or with `shuffle=True`. {_REMEDY}"
        )


def _check_dataset(loader: Any) -> Any:
    # A subclass with its own way of iterating would lose it when the loader is recreated for each client.
    if not isinstance(loader, DataLoader) or type(loader).__iter__ is not DataLoader.__iter__:
        raise ValueError(
            f"The training loader is a {type(loader).__name__}; only one plain DataLoader can be split among clients. "
            f"{_REMEDY}"
        )
    dataset: Any = loader.dataset
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise ValueError(
            f"The training loader reads {type(dataset).__name__}, a stream; only a map-style data set with a length "
            f"can be split among clients. {_REMEDY}"
        )
    return dataset


def split_loader(
    loader: DataLoader,
    parts: Sequence[Tensor],
    ids: Sequence[ClientId] | None = None,
    make_dataset: Callable[[int, Tensor], Dataset] | None = None,
    options: Mapping[str, Any] | None = None,
) -> ClientLoaders:
    """Splits a loader among clients: each client's loader reads its part of the data set.

    The clients' loaders are created when they are looked up. They keep the batch size, sampling, collation, workers
    and generator (the same object) of ``loader``; their workers are not persistent.

    Args:
        loader: A plain ``DataLoader`` over a map-style data set.
        parts: For each client the indices of its samples, shape ``[num_samples_of_client]``, possibly empty.
        ids: The clients' ids. None: ``0 .. len(parts)-1``.
        make_dataset: Creates a client's data set from its position and its part. None: a ``Subset``.
        options: Arguments of the clients' loaders that replace those of ``loader``; see :func:`check_loader_options`.

    Raises:
        ValueError: If the loader cannot be split, see :func:`check_splittable`.
    """
    options = options or {}
    check_splittable(loader, options)
    sampler, num_samples = index_sampler(loader), len(loader.dataset)  # type: ignore[arg-type]
    batches = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    size, drop_last = getattr(batches, "batch_size", None), getattr(batches, "drop_last", False)
    clients = range(len(parts)) if ids is None else ids
    position = (
        # A range finds a position without a dict of all clients, which may be a million.
        clients.index if isinstance(clients, range) else {client: i for i, client in enumerate(clients)}.__getitem__
    )
    make = make_dataset or (lambda _, part: Subset(loader.dataset, part.tolist()))
    return ClientLoaders(
        clients,
        lambda client: _rebuild(
            loader, make(position(client), parts[position(client)]), parts[position(client)].tolist(), options
        ),
        num_examples=None
        if size is None or not options.keys().isdisjoint((*_SAMPLERS, "batch_size", "drop_last"))
        else lambda client: examples_per_pass(
            num_drawn(sampler, num_samples, parts[position(client)]), size, drop_last
        ),
    )


def partition_loader(
    loader: DataLoader, partitioner: Partitioner, num_clients: int | None = None, seed: int = 0
) -> ClientLoaders:
    """Splits a loader among clients with a partitioner.

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
    """A ``DataLoader`` that reads the same data in order, as Lightning does for ``overfit_batches``.

    A loader that already does, or has no sampler to replace, is returned unchanged.
    """
    if not isinstance(loader, DataLoader) or isinstance(loader.sampler, SequentialSampler):
        return loader
    if isinstance(loader.dataset, IterableDataset) or not hasattr(loader.dataset, "__len__"):
        return loader
    return _rebuild(loader, loader.dataset, None, {"shuffle": False})


def shard(loader: Any, rank: int, size: int) -> DataLoader:
    """One rank's part of an evaluation loader; no sample is repeated to make the parts equal.

    Args:
        loader: A plain ``DataLoader`` over a map-style data set.
        rank: The rank, ``0 .. size-1``.
        size: Number of ranks.

    Raises:
        ValueError: If the loader cannot be split, or has fewer samples than there are ranks.
    """
    check_plain(loader)
    if len(loader.dataset) < size:
        raise ValueError(
            f"split_validation=True can't split {len(loader.dataset)} samples among {size} ranks; set it to False."
        )
    # Not a `DistributedSampler`, which repeats samples to make the parts equal and so changes the metrics.
    return _rebuild(loader, Subset(loader.dataset, range(rank, len(loader.dataset), size)))


def share_among(loader: Any, rank: int, size: int, seed: int = 0) -> DataLoader:
    """The part of a training loader that one process of a silo reads, split as Lightning's ``DDPStrategy`` does.

    All parts have the same length, so that the processes step together; the last ones may repeat an example.

    Args:
        loader: A plain ``DataLoader`` over a map-style data set, or one with a ``DistributedSampler``.
        rank: The process, ``0 .. size-1``.
        size: Number of processes.
        seed: Seed of the order, if the loader shuffles.

    Raises:
        ValueError: If the loader can't be shared.
    """
    dataset: Any = getattr(loader, "dataset", None)
    if not isinstance(loader, DataLoader) or isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        what = f"reads {type(dataset).__name__}, a stream" if isinstance(loader, DataLoader) else type(loader).__name__
        raise ValueError(
            f"The training loader {what}, which processes can't share. Give one DataLoader over a map-style data set "
            "with the silo's data."
        )
    if isinstance(loader.sampler, DistributedSampler):
        return loader
    check_plain(loader)
    shuffle = isinstance(loader.sampler, RandomSampler)
    sampler: Any = DistributedSampler(dataset, size, rank, shuffle=shuffle, seed=seed)
    return _rebuild(loader, dataset, None, {"sampler": lambda _: sampler, "shuffle": False})


def examples_per_pass(num_samples: int, batch_size: int, drop_last: bool) -> int:
    """Number of examples that one pass over a loader yields."""
    return num_samples // batch_size * batch_size if drop_last else num_samples


def with_dataset(
    loader: DataLoader,
    dataset: Any,
    part: Sequence[int] | None = None,
    options: Mapping[str, Any] | None = None,
    evaluate: bool = False,
) -> DataLoader:
    """A copy of a loader that reads another data set; for evaluation, every sample once and in order.

    Args:
        loader: The loader.
        dataset: The data set, whose samples are those of the loader's data set with the indices ``part``.
        part: Indices. None: all, in order.
        options: Arguments that replace those of ``loader``.
        evaluate: Whether the samples are to be evaluated.
    """
    options = dict(options or {})
    if evaluate:
        options = {name: value for name, value in options.items() if name not in _SAMPLERS}
        options |= {"shuffle": False, "drop_last": False}
    return _rebuild(loader, dataset, part, options)


_SAMPLERS = ("sampler", "batch_sampler")


def check_loader_options(options: Mapping[str, Any]) -> None:
    """Checks arguments for the loaders of several clients, before there is a loader.

    Args:
        options: Any argument of ``DataLoader`` except ``dataset``; ``sampler`` and ``batch_sampler`` are functions that
            make one from a client's data set.

    Raises:
        ValueError: If one is unknown, or a sampler is not a function.
    """
    known = list(inspect.signature(DataLoader).parameters)[1:]
    for name, value in options.items():
        if name not in known:
            raise ValueError(f"{name!r} is not an argument of a DataLoader; it takes {', '.join(known)}.")
        if name in _SAMPLERS and value is not None and (isinstance(value, Iterable) or not callable(value)):
            raise ValueError(
                f"{name} is a {type(value).__name__}, which draws from one data set, but each client has its own. Give "
                f"a function that creates one: {name}=lambda dataset: {type(value).__name__}(dataset)."
            )


def make_loader(dataset: Any, options: Mapping[str, Any]) -> DataLoader:
    """A ``DataLoader`` of one client; functions among the options create samplers for its data set."""
    options = {name: value for name, value in options.items() if name not in _SAMPLERS or value is not None}
    made = {name: options[name](dataset) for name in _SAMPLERS if name in options}
    # `DataLoader` refuses these beside the others.
    replaced = {"shuffle"} if "sampler" in made else set()
    if "batch_sampler" in made:
        replaced = {"shuffle", "sampler", "batch_size", "drop_last"}
    options = {name: value for name, value in {**options, **made}.items() if name not in replaced}
    # `RandomSampler` refuses an empty data set, which a client may have.
    if not len(dataset) and options.get("shuffle"):
        options["shuffle"] = False
    # Only if batches are formed by index: a data set that reads a whole batch at once returns it collated.
    if options.get("batch_size", 1) is not None or "batch_sampler" in made:
        dataset, options["collate_fn"] = with_fast_collation(dataset, options.get("collate_fn"))
    return DataLoader(dataset, **options)


def _rebuild(
    loader: DataLoader, dataset: Any, part: Sequence[int] | None = None, options: Mapping[str, Any] | None = None
) -> DataLoader:
    """A copy of a loader over ``dataset``, whose samples are those of ``part``; ``options`` replace its settings."""
    sampler, whole = index_sampler(loader), loader.batch_sampler is None and type(loader.sampler) is BatchSampler
    batches: Any = loader.sampler if whole else loader.batch_sampler
    own: dict[str, Any] = {
        "batch_size": getattr(batches, "batch_size", loader.batch_size),
        "drop_last": getattr(batches, "drop_last", loader.drop_last),
        "num_workers": loader.num_workers,
        "collate_fn": loader.collate_fn,
        "pin_memory": loader.pin_memory,
        "timeout": loader.timeout,
        "worker_init_fn": loader.worker_init_fn,
        "multiprocessing_context": loader.multiprocessing_context,
        # The new loader creates its own sampler, which gets only this generator; the old sampler's would be lost.
        "generator": loader.generator if loader.generator is not None else _generator_of(sampler),
        "prefetch_factor": loader.prefetch_factor,
        "persistent_workers": False,  # they would accumulate, one set per client
        "in_order": loader.in_order,
    }
    given = dict(options or {})
    if "shuffle" in given or not given.keys().isdisjoint(_SAMPLERS):
        return make_loader(dataset, {**own, **given})
    if is_plain(sampler, len(loader.dataset)) and not whole:  # type: ignore[arg-type]
        own["shuffle"] = isinstance(sampler, RandomSampler)
        return make_loader(dataset, {**own, **given})
    restricted = sampler_of_part(sampler, loader.dataset, range(len(dataset)) if part is None else part)
    size, drop_last = {**own, **given}["batch_size"], {**own, **given}["drop_last"]
    if whole:
        batched = BatchSampler(restricted, size, drop_last)
        return make_loader(
            dataset, {**own, **given, "sampler": lambda _: batched, "batch_size": None, "drop_last": False}
        )
    return make_loader(dataset, {**own, **given, "sampler": lambda _: restricted})


def _generator_of(sampler: Any) -> torch.Generator | None:
    found = getattr(sampler, "generator", None)
    return found if isinstance(found, torch.Generator) else None


def _size(sampler: Any) -> str:
    """Describes the number of samples that a sampler draws, for an error message."""
    replaced = " with replacement" if getattr(sampler, "replacement", False) else ""
    return f"{len(sampler) if hasattr(sampler, '__len__') else '?'}{replaced}"
