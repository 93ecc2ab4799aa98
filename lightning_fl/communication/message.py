"""Messages between ranks: JSON fields and tensors.

Never pickles: unpickling runs code of the sender's choice, and a message may come from another organisation.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from safetensors.torch import load, save

from lightning_fl.types import Tree

FIELDS = "__fields__"


@dataclass(frozen=True)
class Message:
    """A small message between ranks.

    Args:
        fields: Any value that JSON can represent.
        tensors: Tensors by name; they arrive on the CPU.
    """

    fields: dict[str, Any] = field(default_factory=dict)
    tensors: Tree = field(default_factory=dict)

    def encode(self) -> bytes:
        """The message as bytes, in the safetensors format."""
        # Clones, because safetensors refuses tensors that share memory.
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in self.tensors.items()}
        return save(tensors, metadata={FIELDS: json.dumps(self.fields)})

    @classmethod
    def decode(cls, data: bytes) -> Message:
        """The message that :meth:`encode` encoded.

        Raises:
            ValueError: If the bytes are not such a message.
        """
        try:
            # safetensors does not return the metadata, so the header is read here: its length, then its JSON.
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            return cls(fields_of(header), load(data))
        except Exception as error:  # untrusted bytes raise many types: deep nesting, shapes that overflow, ...
            raise ValueError(f"A rank sent {len(data)} bytes that are no message of ours: {error}") from error


def fields_of(header: Any) -> dict[str, Any]:
    """The JSON fields in the header of a safetensors file, which may be anything."""
    fields = json.loads(header["__metadata__"][FIELDS])
    if not isinstance(fields, dict):
        raise TypeError(f"its fields are a {type(fields).__name__}, expected a dict")
    return fields
