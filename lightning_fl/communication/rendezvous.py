"""Rendezvous of the processes of a federation."""

from __future__ import annotations

import os
import socket
import time
from collections import Counter
from contextlib import suppress
from datetime import timedelta
from itertools import pairwise

import torch
import torch.distributed as dist

from lightning_fl.communication.attendance import FIRST_NOTICE, LONGEST_NOTICE, Attendance, log
from lightning_fl.communication.group import Group, LocalGroup, TorchGroup
from lightning_fl.communication.message import Message
from lightning_fl.communication.silo import SiloGroup

_federations: Counter[str] = Counter()
_meetings: Counter[str] = Counter()
_default_groups: list[dist.Store] = []
"""The stores of the default groups that this module created and may replace."""


def connect(
    rank: int,
    size: int,
    address: str,
    port: int,
    device: torch.device,
    timeout: timedelta = timedelta(minutes=30),
    name: str = "",
) -> Group:
    """Joins the processes of a federation in a group; each process must call it the same number of times.

    Args:
        rank: Index of this process, from 0.
        size: Number of processes; 1 needs no connection.
        address: Host of the store: ``MASTER_ADDR`` under torchrun.
        port: Port of the store.
        device: Device of the model.
        timeout: Maximum time that a collective waits for the other ranks.
        name: The name of this rank's silo, unique among the ranks; empty if silos have none.
    """
    if size == 1:
        return LocalGroup()
    store, own = _meet(rank, size, address, port, timeout)
    return TorchGroup(store, rank, size, device, timeout, own, name)


def connect_silos(
    rank: int,
    size: int,
    ranks: int,
    is_spread: bool,
    address: str,
    port: int,
    device: torch.device,
    timeout: timedelta = timedelta(minutes=30),
    name: str = "",
) -> SiloGroup:
    """Joins processes to silos of several processes, and the silos to a federation; each process must call it.

    Torch's default process group becomes that of the silo.

    Args:
        rank: Index of this process among all, from 0; the processes of a silo are consecutive.
        size: Number of processes of all silos.
        ranks: Number of processes of this silo.
        is_spread: Whether parameters are sharded over the processes of a silo.
        address: Host of the store.
        port: Port of the store.
        device: Device of the model.
        timeout: Maximum time that a collective waits for the other processes.
        name: The name of this silo; empty if silos have none.

    Raises:
        ValueError: On every process, if the silos' sizes don't add up, or differ although parameters are sharded.
    """
    if size == 1:
        _own_default_group(dist.HashStore(), 0, 1, device, timeout)
        return SiloGroup(LocalGroup(), LocalGroup(), LocalGroup() if is_spread else None, 0, 1)
    store, own = _meet(rank, size, address, port, timeout)
    Attendance(dist.PrefixStore("processes", store), rank, size).arrive("", timeout)
    store.set(f"ranks/{rank}", str(ranks))
    sizes = [int(store.get(f"ranks/{other}")) for other in range(size)]
    firsts = [0]
    while firsts[-1] < size:
        firsts.append(firsts[-1] + max(sizes[firsts[-1]], 1))
    of_silos = [sizes[first:end] for first, end in pairwise(firsts)]
    if firsts[-1] != size or any(min(each) != max(each) for each in of_silos):
        raise ValueError(
            f"The processes report silos of {sizes} processes, in the order of the ranks. The processes of a silo must "
            "be consecutive; start as many as silo=fl.silos.DDP(ranks=...) has, or leave ranks out if each silo is one "
            "machine."
        )
    if is_spread and len({len(each) for each in of_silos}) > 1:
        raise ValueError(
            f"The silos have {[len(each) for each in of_silos]} processes. If parameters are sharded over them, all "
            "silos need the same number, so that each shard has its counterparts. Use fl.silos.DDP(), or start the "
            "same number in each."
        )
    silo = next(place for place, first in enumerate(firsts[1:]) if rank < first)
    place, num_silos = rank - firsts[silo], len(of_silos)

    def group(prefix: str, index: int, number: int, name: str) -> Group:
        if number == 1:
            return LocalGroup()
        return TorchGroup(dist.PrefixStore(prefix, store), index, number, device, timeout, own, name)

    inner = group(f"silo {silo}", place, ranks, "")
    if isinstance(inner, TorchGroup):  # so that a lost process is named by its silo
        inner.attendance.names = [f"{name or silo}, process {index}" for index in range(ranks)]
    outer = group(f"process {place} of silos", silo, num_silos, name) if is_spread or place == 0 else None
    default = dist.PrefixStore(f"default {silo}", store)
    _own_default_group(default, place, ranks, device, timeout)
    said = Message({"names": list(outer.names) if outer is not None else []})
    names = inner.broadcast_message(said).fields["names"]
    return SiloGroup(inner, outer if place == 0 else None, outer if is_spread else None, silo, num_silos, names)


def _own_default_group(store: dist.Store, rank: int, size: int, device: torch.device, timeout: timedelta) -> None:
    """Makes the silo's group torch's default group, for operations inside the silo such as FSDP and SyncBatchNorm."""
    if dist.is_initialized():
        if not _default_groups:
            raise ValueError(
                "torch.distributed is already initialised, but its default group has to be that of this silo. Don't "
                "call init_process_group; the strategy does."
            )
        dist.destroy_process_group()
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    _default_groups.append(store)


def _meet(rank: int, size: int, address: str, port: int, timeout: timedelta) -> tuple[dist.Store, str | None]:
    """The store of the ranks, under a prefix of this federation, and the address at which they reach this one."""
    # Under torchrun the agent already serves a store at this address; elsewhere rank 0 has to.
    agent_keeps_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE", "") == "True"
    # The agent's store outlives a restart of its workers. The keys carry the attempt, and the number of the federation
    # within it, so that no group finds the keys of an earlier one.
    attempt = f"{os.environ.get('TORCHELASTIC_RUN_ID', '')}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    store = _open_store(address, port, size, rank == 0 and not agent_keeps_store, timeout)
    prefix = f"lightning_fl/{attempt}/{_federations[attempt]}"
    _federations[attempt] += 1
    own = None if "GLOO_SOCKET_IFNAME" in os.environ else own_address(address, port, size)
    return dist.PrefixStore(prefix, store), own


def meet_again(rank: int, size: int, address: str, port: int, timeout: timedelta) -> tuple[dist.Store, str | None]:
    """Like :func:`_meet`, but a process that torchrun restarted rejoins those that continued without it."""
    run = os.environ.get("TORCHELASTIC_RUN_ID", "")
    keeps_it = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE", "") != "True"
    store = _open_store(address, port, size, keeps_it, timeout)
    prefix = f"lightning_fl/lines/{run}/{_meetings[run]}"
    _meetings[run] += 1
    own = None if "GLOO_SOCKET_IFNAME" in os.environ else own_address(address, port, size)
    return dist.PrefixStore(prefix, store), own


def _open_store(address: str, port: int, size: int, keeps_it: bool, timeout: timedelta) -> dist.Store:
    """The store of the ranks, kept by one of them or by torchrun; it says that it waits for the one that keeps it."""
    end, patience = time.monotonic() + timeout.total_seconds(), 4 * FIRST_NOTICE
    while True:
        left = timedelta(seconds=max(min(patience, end - time.monotonic()), 1.0))
        try:
            # Waiting for the ranks happens later, with log messages and names, not silently in here.
            store = dist.TCPStore(
                address, port, size, keeps_it, timeout=left, multi_tenant=True, wait_for_workers=False
            )
        except RuntimeError:
            if keeps_it or time.monotonic() > end:
                raise
            log.warning(f"Waiting for the rank that hosts the rendezvous, {address}:{port}, which does not answer yet.")
            patience = min(2 * patience, LONGEST_NOTICE)
            continue
        store.set_timeout(timeout)
        return store


def launched_group(timeout: timedelta = timedelta(minutes=30)) -> Group:
    """The group of the processes started by torchrun or a launcher with the same variables; otherwise a local group.

    Args:
        timeout: Maximum time that a collective waits for the other ranks.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return LocalGroup()
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ValueError(f"WORLD_SIZE is {size}, but {', '.join(missing)} is not set. Start the ranks with torchrun.")
    environ = os.environ
    address, port = environ["MASTER_ADDR"], int(environ["MASTER_PORT"])
    return connect(int(environ["RANK"]), size, address, port, torch.device("cpu"), timeout)


def own_address(address: str, port: int, size: int) -> str:
    """This machine's address on the route to the store, at which the other ranks can reach it.

    Gloo would use the address to which the machine's own name resolves, which is often 127.0.0.1.

    Args:
        address: Host of the store.
        port: Port of the store.
        size: Number of processes.
    """
    found = _source_of_route(address, port)
    on_this_machine = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    several = on_this_machine < size or int(os.environ.get("SLURM_NNODES", 1)) > 1
    if several and found.startswith("127."):
        # The store is on this machine, under a name that is local to it. An arbitrary external address gives the
        # default route, if there is one.
        with suppress(OSError):
            return _source_of_route("192.0.2.1", port)
    return found


def _source_of_route(address: str, port: int) -> str:
    family, kind, protocol, _, place = socket.getaddrinfo(address, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as connection:
        connection.connect(place)  # sends nothing, but selects the route
        return str(connection.getsockname()[0])
