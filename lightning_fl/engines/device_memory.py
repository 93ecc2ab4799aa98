"""A device's total and free memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class DeviceMemory:
    """A device's memory, in bytes.

    Args:
        total: Total memory.
        free: Memory that this process could allocate, including what PyTorch's caching allocator holds unused.
    """

    total: int
    free: int


def device_memory(device: torch.device) -> DeviceMemory | None:
    """The memory of a GPU; None for other devices, which use the machine's memory."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return DeviceMemory(total, free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
