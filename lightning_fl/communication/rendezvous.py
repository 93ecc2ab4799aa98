"""Rendezvous: how the processes of a federation find each other."""

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
    """Joins the processes of a federation in a group; each process must call it the same number of times.

    Args:
        rank: Index of this process, from 0.
        size: Number of processes; 1 needs no connection.
        address: Host of the store: ``MASTER_ADDR`` under torchrun.
        port: Port of the store.
        device: Device of the model.
        timeout: How long a collective waits for the other ranks.
    """
    if size == 1:
        return LocalGroup()
    # Under torchrun the agent already serves a store at this address; elsewhere rank 0 has to.
    agent_keeps_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE", "") == "True"
    # The agent's store outlives a restart of its workers. The keys carry the attempt, and the number of the federation
    # within it, so that no group finds the keys of an earlier one.
    attempt = f"{os.environ.get('TORCHELASTIC_RUN_ID', '')}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    store = dist.TCPStore(
        address, port, size, is_master=rank == 0 and not agent_keeps_store, timeout=timeout, multi_tenant=True
    )
    prefix = f"lightning_fl/{attempt}/{_federations[attempt]}"
    _federations[attempt] += 1
    return TorchGroup(dist.PrefixStore(prefix, store), rank, size, device, timeout)
