"""A pool of CPU memory that training steps reuse."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_fl.torch_internals import num_references

MIN_BYTES = 128 * 2**10
"""glibc's ``malloc`` caches smaller blocks by itself."""


class BufferPool:
    """Allocates CPU tensors, and reuses their memory once nothing refers to it.

    Returning megabytes to the operating system and allocating them again in each step can take longer than the step's
    arithmetic. For CUDA tensors, PyTorch has a caching allocator already.
    """

    def __init__(self) -> None:
        self._buffers: list[tuple[Tensor, torch.UntypedStorage, int]] = []

    def empty(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """A tensor with arbitrary values, of the dtype and on the device of ``like``."""
        size = torch.Size(shape)
        num_bytes = size.numel() * like.dtype.itemsize
        if like.device.type != "cpu" or num_bytes < MIN_BYTES:
            return like.new_empty(size)
        # More references than when it was made mean that a tensor, or autograd, still uses the memory.
        free = [own for own in self._buffers if num_references(own[1]) == own[2]]
        fitting = [own for own in free if own[0].numel() >= num_bytes]
        if not fitting:
            # Free memory that is too small is released; otherwise sizes that are no longer requested would add up.
            too_small = set(map(id, free))
            self._buffers = [own for own in self._buffers if id(own) not in too_small]
            memory = torch.empty(num_bytes, dtype=torch.uint8)
            storage = memory.untyped_storage()
            fitting = [(memory, storage, num_references(storage))]
            self._buffers += fitting
        # The smallest block that fits leaves the large ones for large tensors.
        memory = min(fitting, key=lambda own: own[0].numel())[0]
        return memory[:num_bytes].view(like.dtype).view(size)
