"""The interface of a compressor: a flat vector to bytes and back."""

# No `from __future__ import annotations`: jsonargparse would resolve the strings in the modules of the subclasses.
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_fl.aggregation.aggregator import Aggregator


class Compressor(ABC):
    """Turns a flat vector into bytes, whose number depends on its size only, and back."""

    is_idempotent: ClassVar[bool] = False
    """Whether what was decoded is encoded and decoded again without further loss."""
    shortens: ClassVar[bool] = False
    """Whether no decoded vector is longer than the one that was encoded."""
    shares_randomness: ClassVar[bool] = False
    """Whether all clients of a round use the same random numbers."""

    @abstractmethod
    def num_bytes(self, size: int) -> int:
        """How many bytes a vector of ``size`` elements takes."""

    @abstractmethod
    def encode(self, vector: Tensor, generator: torch.Generator) -> Tensor:
        """The bytes of a vector, uint8 of shape ``[num_bytes(len(vector))]``, on the CPU.

        Args:
            vector: A flat vector of real numbers.
            generator: For whatever is drawn at random.
        """

    @abstractmethod
    def decode(self, payload: Tensor, size: int) -> Tensor:
        """The vector of ``size`` elements that bytes stand for, float32 on the CPU.

        Raises:
            ValueError: If the bytes do not fit.
        """

    def check(self, payload: Tensor, size: int) -> None:
        """Makes sure that bytes from somebody else have the right length.

        Raises:
            ValueError: If they have not.
        """
        if payload.dtype != torch.uint8 or payload.shape != (self.num_bytes(size),):
            raise ValueError(
                f"{type(self).__name__} got {payload.numel()} bytes of a client for {size} numbers, and expected "
                f"{self.num_bytes(size)}. Start all ranks with the same compressor."
            )


def as_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a tensor."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def from_bytes(payload: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor whose bytes these are; a copy, because the bytes may not be aligned."""
    return payload.clone().view(dtype)


def pack_bits(values: Tensor, bits: int) -> Tensor:
    """Integers below ``2**bits`` side by side in bytes; ``bits`` divides 8.

    Args:
        values: ``[n]``.
        bits: 1, 2, 4 or 8.
    """
    per_byte = 8 // bits
    padded = torch.zeros(-(-len(values) // per_byte) * per_byte, dtype=torch.int32)
    padded[: len(values)] = values.to(torch.int32).cpu()
    shifts = torch.arange(per_byte, dtype=torch.int32) * bits
    return (padded.view(-1, per_byte) << shifts).sum(1).to(torch.uint8)


def unpack_bits(payload: Tensor, bits: int, size: int) -> Tensor:
    """The first ``size`` integers of :func:`pack_bits`, int32."""
    shifts = torch.arange(8 // bits, dtype=torch.int32) * bits
    return ((payload.to(torch.int32)[:, None] >> shifts) & ((1 << bits) - 1)).reshape(-1)[:size]


def packed_size(size: int, bits: int) -> int:
    """How many bytes :func:`pack_bits` gives."""
    return -(-size * bits // 8)


def refuse_server_data(transform: Any, aggregator: Aggregator) -> None:
    """Refuses an aggregator that tries or compares whole models, where clients send parts of them.

    Raises:
        ValueError: If it does.
    """
    if aggregator.needs_server:
        raise ValueError(
            f"{aggregator!r} looks at whole models, but with {transform!r} clients send parts. Leave one of them out, "
            "or take a compressor such as fl.compression.TopK."
        )
