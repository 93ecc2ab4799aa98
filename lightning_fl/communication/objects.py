"""Plain Python objects as JSON that preserves their types, so that Lightning's ``broadcast`` needs no pickle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_fl.communication.message import Message
from lightning_fl.types import Tree


def encode(value: Any, tensors: Tree | None = None) -> Any:
    """Encodes an object as a JSON value.

    JSON has no tuples, no paths, and no dicts with keys other than strings. They become JSON objects with one key that
    names the type.

    Args:
        value: Numbers, strings, None, paths, and lists, tuples and dicts of these.
        tensors: Collects the tensors inside ``value``. None: a tensor of one element becomes a number, others are
            refused.

    Raises:
        TypeError: If ``value`` holds anything else.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return [encode(item, tensors) for item in value]
    if isinstance(value, tuple):
        return {"tuple": [encode(item, tensors) for item in value]}
    if isinstance(value, dict):
        return {"dict": [[encode(key, tensors), encode(item, tensors)] for key, item in value.items()]}
    if isinstance(value, Path):
        return {"path": str(value)}
    if isinstance(value, Tensor) and tensors is not None:
        name = str(len(tensors))
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    raise TypeError(
        f"Ranks can't send each other a {type(value).__name__}; they send numbers, strings, None, paths, tensors, and "
        "lists, tuples and dicts of these."
    )


def decode(value: Any, tensors: Tree | None = None) -> Any:
    """Decodes the result of :func:`encode`."""
    if isinstance(value, list):
        return [decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tuple":
        return tuple(decode(item, tensors) for item in content)
    if kind == "dict":
        return {decode(key, tensors): decode(item, tensors) for key, item in content}
    if kind == "path":
        return Path(content)
    return (tensors or {})[content]


def encode_object(value: Any) -> Message:
    """Encodes an object as a message.

    Raises:
        TypeError: If it holds a type that ranks can't send.
    """
    tensors: Tree = {}
    return Message({"object": encode(value, tensors)}, tensors)


def decode_object(message: Message) -> Any:
    """Decodes the result of :func:`encode_object`."""
    return decode(message.fields["object"], message.tensors)
