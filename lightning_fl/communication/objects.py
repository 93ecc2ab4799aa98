"""Python objects as JSON, with their types kept: what ranks and Lightning send each other besides tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_fl.communication.message import Message
from lightning_fl.types import Tree


def encode(value: Any, tensors: Tree | None = None) -> Any:
    """Turns an object into what JSON can hold.

    Args:
        value: Numbers, strings, None, paths, and lists, tuples and dicts of these.
        tensors: Takes the tensors inside; None: tensors of one element become numbers, others are refused.

    Raises:
        TypeError: If it holds anything else.
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
    """What :func:`encode` was given."""
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
    """An object as a message.

    Raises:
        TypeError: If it can't be sent.
    """
    tensors: Tree = {}
    return Message({"object": encode(value, tensors)}, tensors)


def decode_object(message: Message) -> Any:
    """What :func:`encode_object` was given."""
    return decode(message.fields["object"], message.tensors)
