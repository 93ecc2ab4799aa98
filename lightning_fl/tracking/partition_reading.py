"""Reads the clients' sizes and labels for the summary of the partition."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from lightning_fl.clients import Population
from lightning_fl.communication import Group, Message
from lightning_fl.data.targets import targets
from lightning_fl.tracking.partition import PartitionSummary

NUM_BINS = 10
MAX_CLASSES = 200


def summarise(
    population: Population, group: Group, max_clients: int = 1000, read_samples: bool = False, share_labels: bool = True
) -> PartitionSummary:
    """Summarises the clients' data without training; a collective call.

    Labels come from where a data set stores them: ``targets``, ``labels``, or the last tensor of a ``TensorDataset``.

    Args:
        population: The clients.
        group: The ranks of the federation. Each silo reads its own data; the results are gathered.
        max_clients: Maximum number of clients to read; if there are more, evenly spaced ones are chosen.
        read_samples: Whether to read every sample of data sets that do not store their labels.
        share_labels: Whether the summary contains the clients' numbers of examples of each label.
    """
    ids = list(population.ids) if len(population) <= max_clients else _spread(population.ids, max_clients)
    if population.silos is None:
        found = _look(population, ids, read_samples, share_labels)
        return _join(len(population), [found])
    local = _look(population, list(population.loaders), read_samples, share_labels)
    # Only classes are shared: the ranges of a numeric target are a silo's own quantiles, which reveal values and differ
    # from those of other silos.
    values = local["values"] if local["kind"] == "classes" else {}
    gathered = group.all_gather(Message({**local, "values": values}), "partition")
    return _join(len(population), [message.fields for message in gathered])


def _spread(ids: Sequence[Any], count: int) -> list[Any]:
    return [ids[position] for position in np.linspace(0, len(ids) - 1, count).astype(int)]


def _look(population: Population, ids: Sequence[Any], read_samples: bool, share_labels: bool) -> dict[str, Any]:
    """The clients' sizes and label counts as JSON values; ``values`` maps each label to its count per client."""
    sizes: list[int | None] = []
    labels: list[np.ndarray | None] = []
    # Simulated clients are subsets of one data set, whose labels should be read once.
    cache: dict[int, tuple[Any, np.ndarray | None]] = {}
    for client in ids:
        loader = population.loaders[client]
        sizes.append(population.num_examples(client, loader))
        dataset = getattr(loader, "dataset", None)
        has_labels = share_labels and dataset is not None
        labels.append(_labels(dataset, cache, read_samples) if has_labels else None)
    kind, values = _count(labels)
    return {"ids": list(ids), "sizes": sizes, "kind": kind, "values": values}


def _labels(dataset: Any, cache: dict[int, tuple[Any, np.ndarray | None]], read_samples: bool) -> np.ndarray | None:
    if isinstance(dataset, Subset):
        whole = _labels(dataset.dataset, cache, read_samples)
        return None if whole is None else whole[np.asarray(dataset.indices, dtype=np.int64)]
    if isinstance(dataset, ConcatDataset):
        parts = [_labels(part, cache, read_samples) for part in dataset.datasets]
        known = [part for part in parts if part is not None]
        return np.concatenate(known) if known and len(known) == len(parts) else None
    # The cache also holds the data set itself, so that its id is not given to another one.
    if id(dataset) not in cache:
        cache[id(dataset)] = dataset, _stored(dataset, read_samples)
    return cache[id(dataset)][1]


def _stored(dataset: Any, read_samples: bool) -> np.ndarray | None:
    values = dataset.tensors[-1] if isinstance(dataset, TensorDataset) and len(dataset.tensors) > 1 else None
    for name in ("targets", "labels"):
        if values is None and hasattr(getattr(dataset, name, None), "__len__"):
            values = getattr(dataset, name)
    if values is None and read_samples:
        try:
            return targets(dataset)
        except ValueError:
            return None
    try:
        array = np.asarray(values)
        fits = array.dtype.kind in "iubf" and array.ndim in (1, 2) and len(array) == len(dataset)
    except (TypeError, ValueError, RuntimeError):
        return None
    return array if fits else None


def _count(labels: Sequence[np.ndarray | None]) -> tuple[str, dict[str, list[int]]]:
    known = [part for part in labels if part is not None and part.size]
    shapes = {(part.ndim, part.shape[1:]) for part in known}
    if not known or any(part is None for part in labels) or len(shapes) != 1:
        return "unknown", {}
    parts = [part if part is not None and part.size else known[0][:0] for part in labels]
    if known[0].ndim == 2:
        is_multi_label = all(np.isin(part, (0, 1)).all() for part in known)
        counts = np.stack([part.sum(axis=0) for part in parts]).astype(int)
        return ("classes", _by_label(range(counts.shape[1]), counts)) if is_multi_label else ("unknown", {})
    classes = np.unique(np.concatenate(known))
    if classes.dtype.kind == "f" or len(classes) > MAX_CLASSES:
        edges = np.unique(np.nanquantile(np.concatenate(known), np.linspace(0, 1, NUM_BINS + 1)))
        if len(edges) < 2:
            return "unknown", {}
        names = [f"{low:.3g} to {high:.3g}" for low, high in pairwise(edges)]
        return "ranges", _by_label(names, np.stack([np.histogram(part, edges)[0] for part in parts]))
    counts = np.stack([np.bincount(np.searchsorted(classes, part), minlength=len(classes)) for part in parts])
    return "classes", _by_label(classes.tolist(), counts)


def _by_label(names: Sequence[Any], counts: np.ndarray) -> dict[str, list[int]]:
    return {str(name): column.tolist() for name, column in zip(names, counts.T, strict=True)}


def _join(num_clients: int, found: Sequence[Mapping[str, Any]]) -> PartitionSummary:
    ids = [client for fields in found for client in fields["ids"]]
    sizes = [size for fields in found for size in fields["sizes"]]
    if not all(fields["values"] for fields in found):
        return PartitionSummary(num_clients, ids, sizes)
    names = list(dict.fromkeys(name for fields in found for name in fields["values"]))
    if all(name.lstrip("-").isdigit() for name in names):
        # As strings, 10 would come before 2.
        names.sort(key=int)
    counts = [
        [fields["values"].get(name, [0] * len(fields["ids"]))[row] for name in names]
        for fields in found
        for row in range(len(fields["ids"]))
    ]
    return PartitionSummary(num_clients, ids, sizes, names, counts)
