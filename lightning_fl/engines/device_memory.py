"""How much memory a device has."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class DeviceMemory:
    """A device's memory, in bytes.

    Args:
        total: All of it.
        free: What this process could allocate, with what PyTorch keeps for later.
    """

    total: int
    free: int


def device_memory(device: torch.device) -> DeviceMemory | None:
    """The memory of a GPU; None for other devices, which share the machine's."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return DeviceMemory(total, free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
