"""Partitioners for data that says whose each sample is: by a column, or by a file."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightning_fl.data.partitioners.partitioner import Partitioner
from lightning_fl.data.targets import column
from lightning_fl.types import ClientId


class _Named(Partitioner):
    """A partitioner whose clients the data names; ``num_clients`` may be left out."""

    names_clients = True

    def client_ids(self, dataset: Any, num_clients: int | None = None) -> Sequence[ClientId]:
        """The ids that the data names, in order.

        Raises:
            ValueError: If ``num_clients`` is given and differs from their number.
        """
        ids = self._ids(dataset)
        if num_clients is not None and num_clients != len(ids):
            raise ValueError(
                f"num_clients={num_clients} does not fit {self}, which names {len(ids)} clients; leave num_clients out."
            )
        return ids

    def _ids(self, dataset: Any) -> Sequence[ClientId]:
        raise NotImplementedError


@dataclass(frozen=True)
class NaturalColumn(_Named):
    """The clients that a column names: a writer, a hospital, a shop.

    Args:
        name: Name of an attribute of the data set with one value a sample, of a Hugging Face column, or of an entry of
            samples that are mappings; or the position of an entry of samples that are tuples.
        min_size: Smallest number of samples of a client.

    Raises:
        ValueError: When called, if there is no such column, or a client has fewer than ``min_size`` samples.
    """

    name: str | int
    _: KW_ONLY
    min_size: int = 1

    def _ids(self, dataset: Any) -> Sequence[ClientId]:
        return np.unique(column(dataset, self.name)).tolist()

    def split(self, dataset: Any, num_clients: int, rng: np.random.Generator) -> Sequence[np.ndarray]:
        """See :meth:`Partitioner.split`."""
        names, owner, sizes = np.unique(column(dataset, self.name), return_inverse=True, return_counts=True)
        small = [f"{names[i]!s} ({sizes[i]})" for i in np.flatnonzero(sizes < self.min_size)]
        if small:
            raise ValueError(
                f"{len(small)} clients of column {self.name!r} have fewer than min_size={self.min_size} samples: "
                f"{', '.join(small[:5])}{', ...' if len(small) > 5 else ''}. Leave them out or lower min_size."
            )
        return np.split(np.argsort(owner, kind="stable"), np.cumsum(sizes)[:-1])


@dataclass(frozen=True)
class MappingFile(_Named):
    """The clients that a JSON file names: ``{"client": [sample, ...], ...}``, each sample exactly once.

    :func:`save_mapping` writes such a file from any partition.

    Args:
        path: The file.

    Raises:
        ValueError: When called, if the file is no such mapping, or gives a sample to nobody, to several or twice, or
            one that does not exist.
        FileNotFoundError: When called, if there is no such file.
    """

    path: str | Path

    def _read(self) -> dict[str, list[int]]:
        try:
            mapping = json.loads(Path(self.path).read_text(), object_pairs_hook=_without_repeats)
        except json.JSONDecodeError as error:
            raise ValueError(f"{self.path} is no JSON file: {error}. It may be cut short; write it anew.") from error
        if not isinstance(mapping, dict) or not mapping or not all(map(_are_indices, mapping.values())):
            raise ValueError(
                f'{self.path} is no mapping file: expected {{"client": [sample, ...], ...}} with whole numbers from 0.'
            )
        return mapping

    def _ids(self, dataset: Any) -> Sequence[ClientId]:
        return list(self._read())

    def split(self, dataset: Any, num_clients: int, rng: np.random.Generator) -> Sequence[np.ndarray]:
        """See :meth:`Partitioner.split`."""
        mapping = self._read()
        times = Counter(sample for samples in mapping.values() for sample in samples)
        _refuse(self.path, "name samples twice", [sample for sample, number in times.items() if number > 1])
        _refuse(self.path, f"name samples beyond the {len(dataset)}", [s for s in times if s >= len(dataset)])
        _refuse(self.path, "leave out samples", [s for s in range(len(dataset)) if s not in times])
        _refuse(self.path, "name clients without a sample", [name for name, part in mapping.items() if not part])
        return [np.array(samples, dtype=np.int64) for samples in mapping.values()]


def save_mapping(path: str | Path, parts: Sequence[torch.Tensor] | Mapping[ClientId, torch.Tensor]) -> None:
    """Writes a partition to a file that :class:`MappingFile` reads, so that others can train on the same clients.

    Args:
        path: The file, which appears whole or not at all.
        parts: For each client the indices of its samples; a mapping from client id, or a sequence.
    """
    named = parts if isinstance(parts, Mapping) else dict(enumerate(parts))
    partial = Path(f"{path}.part")
    partial.write_text(json.dumps({str(client): part.tolist() for client, part in named.items()}))
    partial.replace(path)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    repeated = [name for name, number in Counter(name for name, _ in pairs).items() if number > 1]
    if repeated:
        raise ValueError(f"The mapping file names client {repeated[0]!r} twice; join its samples in one list.")
    return dict(pairs)


def _are_indices(samples: Any) -> bool:
    return isinstance(samples, list) and all(type(sample) is int and sample >= 0 for sample in samples)


def _refuse(path: str | Path, fault: str, found: Sequence[Any]) -> None:
    if found:
        raise ValueError(
            f"The entries of {path} {fault}: {', '.join(map(str, found[:5]))}{', ...' if len(found) > 5 else ''} "
            f"({len(found)} in all). Every sample must belong to exactly one client, and every client have one."
        )
