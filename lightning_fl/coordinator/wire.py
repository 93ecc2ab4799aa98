"""Tensors and JSON fields in one file, in the safetensors format: what travels, and what the coordinator keeps.

A file from the network is read in two steps: :func:`read_header` looks at names, shapes, dtypes and fields, and only a
file with the expected ones is opened with :func:`read`. Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from lightning_fl.communication.message import FIELDS, fields_of
from lightning_fl.tree import SEPARATOR, unflatten
from lightning_fl.types import Tree

MAX_HEADER_BYTES = 1 << 25
"""32 MiB: names and shapes of 100,000 tensors, and what clients have logged."""
CHUNK = 1 << 22
FINITE_CHUNK = 1 << 18
"""Elements that are looked at together, so that what that takes stays small."""
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

Shapes = dict[str, tuple[str, tuple[int, ...]]]
"""By name a tensor's dtype, as safetensors calls it, and its shape."""


class BadFile(ValueError):
    """A file is not what it has to be."""


@dataclass(frozen=True)
class Header:
    """What a file says of itself.

    Args:
        fields: Any value that JSON can represent.
        shapes: Dtype and shape of each tensor.
    """

    fields: dict[str, Any] = field(default_factory=dict)
    shapes: Shapes = field(default_factory=dict)


def shapes_of(tensors: Mapping[str, Tensor]) -> Shapes:
    """Dtype and shape of each tensor."""
    return {name: (_NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}


def num_bytes(shapes: Shapes) -> int:
    """Bytes of the elements of tensors."""
    return sum(math.prod(shape) * _DTYPES[dtype].itemsize for dtype, shape in shapes.values())


def write(path: Path, tensors: Mapping[str, Tensor], fields: Mapping[str, Any] | None = None) -> str:
    """Writes a file, tensor by tensor and so without a copy of all of them; returns the SHA-256 of its content.

    The same content gives the same bytes. It is on the disk when the function returns.
    """
    header: dict[str, Any] = {"__metadata__": {FIELDS: json.dumps(dict(fields or {}), sort_keys=True)}}
    # Aligned as safetensors aligns them: larger elements first.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    offset = 0
    for name in names:
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    digest = hashlib.sha256()
    path.unlink(missing_ok=True)  # not overwritten: tensors may be read from it
    with path.open("wb") as file:
        for part in [len(encoded).to_bytes(8, "little"), encoded, *(_bytes_of(tensors[name]) for name in names)]:
            digest.update(part)
            file.write(part)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def read_header(path: Path) -> Header:
    """Reads what a file says of itself.

    Raises:
        BadFile: If it is not such a file.
    """
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if not 0 < size <= MAX_HEADER_BYTES:
            raise BadFile(f"its header has {size} bytes, expected at most {MAX_HEADER_BYTES}")
        raw = file.read(size)
    try:
        header = json.loads(raw)
        fields = fields_of(header)
        shapes = {
            name: (str(entry["dtype"]), tuple(int(length) for length in entry["shape"]))
            for name, entry in header.items()
            if name != "__metadata__"
        }
        for name, (dtype, shape) in shapes.items():
            if dtype not in _DTYPES or min(shape, default=0) < 0:
                raise ValueError(f"{readable(name)!r} is {dtype} {list(shape)}")
        unflatten(shapes)  # names that can't be nested are found here, before there are tensors
    except Exception as error:  # untrusted bytes raise many types: deep nesting, wrong kinds, ...
        raise BadFile(f"its header can't be read: {type(error).__name__}: {error}") from error
    return Header(fields, shapes)


def read(path: Path) -> Tree:
    """The tensors of a file; pages are read from the disk when they are first touched.

    Raises:
        BadFile: If it is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # safetensors raises its own error, and others for sizes that overflow
        raise BadFile(f"it can't be read: {error}") from error


def check_shapes(expected: Shapes, found: Shapes) -> None:
    """Makes sure that a file has the expected tensors and no others.

    Raises:
        BadFile: If it has not; the first difference is named.
    """
    for name in [*expected, *found]:
        if expected.get(name) != found.get(name):
            raise BadFile(f"{readable(name)!r} is {_shown(found.get(name))}, expected {_shown(expected.get(name))}")


def readable(name: str) -> str:
    """A name that :func:`~lightning_fl.tree.flatten` made, as people read it."""
    return name.replace(SEPARATOR, " ")


def sha256(path: Path) -> str:
    """The digest of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _bytes_of(tensor: Tensor) -> Any:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else b""  # type: ignore[arg-type]


def _shown(entry: tuple[str, tuple[int, ...]] | None) -> str:
    return "missing" if entry is None else f"{entry[0]} {list(entry[1])}"


def finite_error(tensors: Mapping[str, Tensor]) -> str | None:
    """Names the first tensor that holds NaN or Inf; None if there is none."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() or tensor.is_complex():
            flat = tensor.reshape(-1)
            for part in flat.split(FINITE_CHUNK):
                if not bool(torch.isfinite(part).all()):
                    return name
    return None
