"""Partitioners for data whose clients are known, from a column or a file."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightning_fl.data.partitioners.partitioner import Partitioner
from lightning_fl.data.targets import Column, column, column_name
from lightning_fl.types import ClientId, as_client_id


class _NamedClients(Partitioner):
    """A partitioner whose clients are named by the data, so that ``num_clients`` is not needed."""

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
class NaturalColumn(_NamedClients):
    """One client for each value of a column, such as a writer, a hospital or a shop.

    Args:
        name: Name of an attribute of the data set with one value per sample, of a Hugging Face column, or of an entry
            or attribute of the samples; the position of an entry of samples that are tuples; a function of a sample; or
            an array of the clients, one for each sample.
        min_size: Minimum number of samples per client.

    Raises:
        ValueError: When called, if there is no such column, or a client has fewer than ``min_size`` samples.
    """

    name: Column
    _: KW_ONLY
    min_size: int = 1

    def _ids(self, dataset: Any) -> Sequence[ClientId]:
        return np.unique(self._column(dataset)).tolist()

    def _column(self, dataset: Any) -> np.ndarray:
        values = column(dataset, self.name)
        kinds = set(map(_kind_of, values)) if values.dtype.kind == "O" else set()
        if len(kinds) > 1 or kinds & {"NoneType", "float"}:
            shown = column_name(self.name)
            raise ValueError(
                f"{shown[0].upper()}{shown[1:]} names clients by {' and '.join(sorted(kinds))}; expected integers or "
                "strings alone. Make all of them strings, and give samples without a client one or remove them."
            )
        return values

    def split(self, dataset: Any, num_clients: int, rng: np.random.Generator) -> Sequence[np.ndarray]:
        """See :meth:`Partitioner.split`."""
        names, owner, sizes = np.unique(self._column(dataset), return_inverse=True, return_counts=True)
        small = [f"{names[i]!s} ({sizes[i]})" for i in np.flatnonzero(sizes < self.min_size)]
        if small:
            raise ValueError(
                f"{len(small)} clients of {column_name(self.name)} have fewer than min_size={self.min_size} samples: "
                f"{', '.join(small[:5])}{', ...' if len(small) > 5 else ''}. Remove their samples or lower min_size."
            )
        return np.split(np.argsort(owner, kind="stable"), np.cumsum(sizes)[:-1])


def _kind_of(value: Any) -> str:
    return "int" if isinstance(value, Integral) else "str" if isinstance(value, str) else type(value).__name__


@dataclass(frozen=True)
class MappingFile(_NamedClients):
    r"""Reads the split from a JSON file ``{"client": [sample, ...], ...}``, in which each sample occurs exactly once.

    A name that is a whole number, such as ``"7"``, is that number; the text 7 is written ``"\"7\""``.
    :func:`save_mapping` writes such a file from any partition, with the same ids.

    Args:
        path: The file.

    Raises:
        ValueError: When called, if the file is not such a mapping, or omits a sample, repeats one, or names one that
            does not exist.
        FileNotFoundError: When called, if the file does not exist.
    """

    path: str | Path

    def _read(self) -> dict[ClientId, list[int]]:
        try:
            mapping = json.loads(
                Path(self.path).read_text(encoding="utf-8"), object_pairs_hook=_refuse_repeated_clients
            )
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{self.path} is not a JSON file ({error}); it may be truncated. Write it again with save_mapping."
            ) from error
        if not isinstance(mapping, dict) or not mapping or not all(map(_are_indices, mapping.values())):
            raise ValueError(
                f'{self.path} is not a mapping file: expected {{"client": [sample, ...], ...}} with integers from 0.'
            )
        found = {_id_of(name): samples for name, samples in mapping.items()}
        if len(found) < len(mapping):
            raise ValueError(
                f"{self.path} has a client twice, once in quotes of its own; join its samples in one list."
            )
        return found

    def _ids(self, dataset: Any) -> Sequence[ClientId]:
        return list(self._read())

    def split(self, dataset: Any, num_clients: int, rng: np.random.Generator) -> Sequence[np.ndarray]:
        """See :meth:`Partitioner.split`."""
        mapping = self._read()
        counts = Counter(sample for samples in mapping.values() for sample in samples)
        _check_none(self.path, "repeats samples", [sample for sample, count in counts.items() if count > 1])
        _check_none(self.path, f"has samples beyond the {len(dataset)}", [s for s in counts if s >= len(dataset)])
        _check_none(self.path, "omits samples", [s for s in range(len(dataset)) if s not in counts])
        _check_none(self.path, "has clients without samples", [name for name, part in mapping.items() if not part])
        return [np.array(samples, dtype=np.int64) for samples in mapping.values()]


def save_mapping(path: str | Path, parts: Sequence[torch.Tensor] | Mapping[ClientId, torch.Tensor]) -> None:
    """Writes a partition to a file for :class:`MappingFile`, so that others can train on the same clients.

    Args:
        path: The file, written atomically.
        parts: For each client the indices of its samples, as a mapping from client id or a sequence.
    """
    named = parts if isinstance(parts, Mapping) else dict(enumerate(parts))
    partial = Path(f"{path}.part")
    partial.write_text(
        json.dumps({_name_of(as_client_id(client)): part.tolist() for client, part in named.items()}), encoding="utf-8"
    )
    partial.replace(path)


def _name_of(client: ClientId) -> str:
    """The key of a client, from which its id comes back with its type; JSON has keys of text only."""
    return client if isinstance(client, str) and _id_of(client) == client else json.dumps(client)


def _id_of(name: str) -> ClientId:
    if name.startswith('"') and name.endswith('"'):
        try:
            return str(json.loads(name))
        except json.JSONDecodeError:
            return name
    return int(name) if re.fullmatch(r"0|-?[1-9]\d*", name, re.ASCII) else name


def _refuse_repeated_clients(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # json.loads keeps only the last value of a repeated key, which would silently drop samples
    repeated = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
    if repeated:
        raise ValueError(f"The mapping file has client {repeated[0]!r} twice; put its samples into one list.")
    return dict(pairs)


def _are_indices(samples: Any) -> bool:
    # The exact type: JSON's true is an int too.
    return isinstance(samples, list) and all(type(sample) is int and sample >= 0 for sample in samples)


def _check_none(path: str | Path, fault: str, faulty: Sequence[Any]) -> None:
    if faulty:
        raise ValueError(
            f"{path} {fault}: {', '.join(map(str, faulty[:5]))}{', ...' if len(faulty) > 5 else ''} ({len(faulty)} in "
            "all). Every sample must belong to exactly one client, and every client needs at least one."
        )
