"""Small Python objects between ranks, as JSON and tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_fl.communication import Message


def encode_object(value: Any) -> Message:
    """Turns what Lightning and its users broadcast into a message.

    Raises:
        TypeError: If it is neither a tensor, a path, nor made of what JSON can hold.
    """
    if isinstance(value, Tensor):
        return Message({"kind": "tensor"}, {"value": value})
    if isinstance(value, Path):
        return Message({"kind": "path", "value": str(value)})
    message = Message({"kind": "plain", "value": value})
    try:
        message.encode()
    except TypeError as error:
        raise TypeError(
            f"Ranks can't send each other a {type(value).__name__} ({error}); they send tensors, paths, numbers, "
            "strings, None, and lists and dicts of these."
        ) from error
    return message


def decode_object(message: Message) -> Any:
    """What :func:`encode_object` was given."""
    kind = message.fields["kind"]
    if kind == "tensor":
        return message.tensors["value"]
    return Path(message.fields["value"]) if kind == "path" else message.fields["value"]
