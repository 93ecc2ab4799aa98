"""The interface of a compressor, which encodes a flat vector as bytes."""

# No `from __future__ import annotations`: jsonargparse would resolve the strings in the modules of the subclasses.
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_fl.aggregation.aggregator import Aggregator


class Compressor(ABC):
    """Encodes a flat vector as bytes, whose number depends on the vector's size only, and decodes it."""

    is_idempotent: ClassVar[bool] = False
    """Whether encoding and decoding a decoded vector again is lossless."""
    shortens: ClassVar[bool] = False
    """Whether the norm of a decoded vector is at most that of the encoded one."""
    shares_randomness: ClassVar[bool] = False
    """Whether all clients of a round use the same random numbers."""

    @abstractmethod
    def num_bytes(self, size: int) -> int:
        """The number of bytes of an encoded vector of ``size`` elements."""

    @abstractmethod
    def encode(self, vector: Tensor, generator: torch.Generator) -> Tensor:
        """The bytes of a vector, uint8 of shape ``[num_bytes(len(vector))]``, on the CPU.

        Args:
            vector: A flat vector of real numbers.
            generator: The source of random numbers.
        """

    @abstractmethod
    def decode(self, payload: Tensor, size: int) -> Tensor:
        """The decoded vector of ``size`` elements, float32 on the CPU.

        Raises:
            ValueError: If the bytes are not valid.
        """

    def check(self, payload: Tensor, size: int) -> None:
        """Checks that bytes from another party have the right length.

        Raises:
            ValueError: If they have not.
        """
        if payload.dtype != torch.uint8 or payload.shape != (self.num_bytes(size),):
            raise ValueError(
                f"{type(self).__name__} got {payload.numel()} bytes from a client for {size} numbers; expected "
                f"{self.num_bytes(size)}. Start all ranks with the same compressor."
            )


def as_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a tensor."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def from_bytes(payload: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor with the given bytes; a copy, because the bytes may not be aligned."""
    return payload.clone().view(dtype)


def pack_bits(values: Tensor, bits: int) -> Tensor:
    """Packs integers below ``2**bits`` into bytes.

    Args:
        values: The integers, ``[n]``.
        bits: 1, 2, 4 or 8.
    """
    per_byte = 8 // bits
    padded = torch.zeros(-(-len(values) // per_byte) * per_byte, dtype=torch.int32)
    padded[: len(values)] = values.to(torch.int32).cpu()
    shifts = torch.arange(per_byte, dtype=torch.int32) * bits
    return (padded.view(-1, per_byte) << shifts).sum(1).to(torch.uint8)


def unpack_bits(payload: Tensor, bits: int, size: int) -> Tensor:
    """Unpacks the first ``size`` integers of :func:`pack_bits`, as int32."""
    shifts = torch.arange(8 // bits, dtype=torch.int32) * bits
    return ((payload.to(torch.int32)[:, None] >> shifts) & ((1 << bits) - 1)).reshape(-1)[:size]


def packed_size(size: int, bits: int) -> int:
    """The number of bytes that :func:`pack_bits` returns."""
    return -(-size * bits // 8)


def refuse_server_data(transform: Any, aggregator: Aggregator) -> None:
    """Refuses an aggregator that evaluates or compares whole models if clients send parts of them.

    Raises:
        ValueError: If the aggregator does.
    """
    if aggregator.needs_server:
        raise ValueError(
            f"{aggregator!r} needs whole models, but with {transform!r} clients send parts. Leave one of them out, or "
            "use a compressor such as fl.compression.TopK."
        )
