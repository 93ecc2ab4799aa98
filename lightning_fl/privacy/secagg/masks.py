"""Masks: AES-256-CTR keystreams added to vectors of integer words."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_fl.privacy.secagg.primitives import keystream

BLOCK_BYTES = 1 << 17
"""A block of words and its mask stay in the processor's cache."""
_ZEROS = bytes(BLOCK_BYTES)
_SPARE = 15  # update_into wants room for a block of the cipher


def apply_masks(words: Tensor, masks: Sequence[tuple[bytes, int]]) -> None:
    """Adds masks to a vector of words in place, modulo 2^32 or 2^64, with memory for one block only.

    Args:
        words: int32 or int64, shape ``[d]``, contiguous, on any device.
        masks: For each mask its 32-byte key, and 1 to add it or -1 to take it off.
    """
    streams = [(Keystream(key), sign) for key, sign in masks]
    for block in words.split(BLOCK_BYTES // words.element_size()):
        for stream, sign in streams:
            block.add_(stream.words(len(block), words.dtype).to(block.device), alpha=sign)


class Keystream:
    """Uniform words from AES-256-CTR, little-endian.

    Args:
        key: 32 bytes; None takes them from the operating system.
    """

    def __init__(self, key: bytes | None = None) -> None:
        assert sys.byteorder == "little", "masks are defined on little-endian machines"
        self._encryptor = keystream(os.urandom(32) if key is None else key)
        self._buffer = bytearray(BLOCK_BYTES + _SPARE)

    def words(self, count: int, dtype: torch.dtype = torch.int32) -> Tensor:
        """The next words, at most a block of them; they are overwritten by the next call."""
        num_bytes = count * dtype.itemsize
        assert num_bytes <= BLOCK_BYTES, f"a block has {BLOCK_BYTES} bytes, asked for {num_bytes}"
        if num_bytes:
            self._encryptor.update_into(memoryview(_ZEROS)[:num_bytes], self._buffer)
        return torch.frombuffer(self._buffer, dtype=dtype, count=count) if count else torch.empty(0, dtype=dtype)
