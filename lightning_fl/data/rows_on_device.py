"""Keeps data sets on a GPU, so that batches are gathered there instead of being copied from the CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from lightning_fl.data.lazy_batches import RowSource
from lightning_fl.torch_internals import version_counter
from lightning_fl.tree import num_bytes


class RowsOnDevice:
    """Moves in-memory data sets to a device when they are first read, as long as they fit.

    Args:
        device: The device.
        max_bytes: Returns the maximum number of bytes of data sets to hold; called once, when the first one is read.
    """

    def __init__(self, device: torch.device, max_bytes: Callable[[], int]) -> None:
        self.device = device
        self._max_bytes = max_bytes
        self._num_left: int | None = None
        # Keep references to the sources too, so that their ids are not reused.
        self._moved: dict[Any, tuple[RowSource, Sequence[int], RowSource]] = {}

    def place(self, source: RowSource) -> RowSource:
        """The data set on the device; the data set itself if it does not fit there."""
        if self._num_left is None:
            self._num_left = self._max_bytes()
        tensors, key = source.tensors, source.source_id
        versions = [*map(version_counter, tensors)]
        if key in self._moved:
            _, seen, moved = self._moved[key]
            if seen == versions:
                return moved
            del self._moved[key]  # the data have been modified since
            self._num_left += num_bytes(tensors)
        if all(tensor.device.type == self.device.type for tensor in tensors) or num_bytes(tensors) > self._num_left:
            return source
        moved = source.to(self.device)
        self._num_left -= num_bytes(tensors)
        self._moved[key] = source, versions, moved
        return moved
