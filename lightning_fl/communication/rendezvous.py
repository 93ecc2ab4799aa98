"""How the processes of a federation find each other."""

from __future__ import annotations

import os
from collections import Counter
from datetime import timedelta

import torch
import torch.distributed as dist

from lightning_fl.communication.group import Group, LocalGroup, TorchGroup

_federations: Counter[str] = Counter()


def connect(
    rank: int, size: int, address: str, port: int, device: torch.device, timeout: timedelta = timedelta(minutes=30)
) -> Group:
    """Joins the processes of a federation; all of them must call it equally often.

    Under torchrun the agent keeps the store; its keys carry the attempt, because a restarted attempt finds the store
    of the one before. Elsewhere rank 0 keeps it.

    Args:
        rank: This process's place, from 0.
        size: Number of processes; 1 needs no connection.
        address: Host of the store.
        port: Port of the store.
        device: Device on which the model lives.
        timeout: How long a collective waits for the other ranks.
    """
    if size == 1:
        return LocalGroup()
    agent_keeps_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE", "") == "True"
    attempt = f"{os.environ.get('TORCHELASTIC_RUN_ID', '')}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    store = dist.TCPStore(
        address, port, size, is_master=rank == 0 and not agent_keeps_store, timeout=timeout, multi_tenant=True
    )
    prefix = f"lightning_fl/{attempt}/{_federations[attempt]}"
    _federations[attempt] += 1
    return TorchGroup(dist.PrefixStore(prefix, store), rank, size, device, timeout)
