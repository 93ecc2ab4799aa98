"""Masks: AES-256-CTR keystreams added to integer vectors."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_fl.privacy.secagg.primitives import keystream

BLOCK_BYTES = 1 << 18
"""Small enough that a block of the vector and its mask stay in the processor's cache."""
_ZEROS = bytes(BLOCK_BYTES)
_SPARE = 15  # update_into requires a buffer longer than its input by a cipher block less one


def apply_masks(vector: Tensor, masks: Sequence[tuple[bytes, int]]) -> None:
    """Adds masks to an integer vector in place, modulo 2^32 or 2^64, with extra memory for one block only.

    Args:
        vector: int32 or int64, shape ``[d]``, contiguous, on any device.
        masks: For each mask its 32-byte key, and 1 to add it or -1 to subtract it.
    """
    buffer = MaskBuffer()
    streams = [(Keystream(key, buffer), sign) for key, sign in masks]
    for block in vector.split(BLOCK_BYTES // vector.element_size()):
        for stream, sign in streams:
            mask = stream.integers(block.numel(), vector.dtype)
            mask = mask.to(vector.device)
            if sign > 0:
                block.add_(mask)
            else:
                block.sub_(mask)


class MaskBuffer:
    """Memory for one block, shared by many keystreams."""

    def __init__(self) -> None:
        self.data = bytearray(BLOCK_BYTES + _SPARE)
        self.views = {
            dtype: torch.frombuffer(self.data, dtype=dtype, count=BLOCK_BYTES // dtype.itemsize)
            for dtype in (torch.int32, torch.int64)
        }


class Keystream:
    """Uniform integers from AES-256-CTR, little-endian.

    Args:
        key: 32 bytes; None takes them from the operating system.
        buffer: Where the integers are written.
    """

    def __init__(self, key: bytes | None = None, buffer: MaskBuffer | None = None) -> None:
        assert sys.byteorder == "little", "masks are defined on little-endian machines"
        self._encryptor = keystream(os.urandom(32) if key is None else key)
        self._buffer = buffer or MaskBuffer()

    def integers(self, count: int, dtype: torch.dtype = torch.int32) -> Tensor:
        """Returns the next ``count`` integers, at most one block; the next call overwrites them."""
        num_bytes = count * dtype.itemsize
        assert num_bytes <= BLOCK_BYTES, f"a block has {BLOCK_BYTES} bytes, asked for {num_bytes}"
        zeros = _ZEROS if num_bytes == BLOCK_BYTES else _ZEROS[:num_bytes]
        # Zeros encrypted in counter mode are the keystream itself.
        self._encryptor.update_into(zeros, self._buffer.data)
        return self._buffer.views[dtype][:count]
