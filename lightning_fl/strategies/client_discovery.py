"""Finds the federation's clients from the user's training loader."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_fl.clients import Population
from lightning_fl.communication import Group
from lightning_fl.data.client_loaders import ClientLoaders, count_examples
from lightning_fl.data.partitioners.partitioner import DEFAULT_NUM_CLIENTS, IID, Partitioner
from lightning_fl.data.splitting import partition_loader, share_among


def build_population(
    loader: Any,
    group: Group,
    started_by_launcher: bool,
    num_clients: int | None,
    partition: Partitioner | None,
    seed: int,
    callbacks: Sequence[Any] = (),
    silo: str | None = None,
    is_of_several: bool = False,
) -> Population:
    """Finds the clients behind a training loader.

    Args:
        loader: The user's training loader.
        group: The ranks of the federation.
        started_by_launcher: Whether torchrun, SLURM or MPI started the ranks, rather than Lightning.
        num_clients: Number of simulated clients. None: not set by the user.
        partition: How the data is split among simulated clients. None: not set by the user.
        seed: Seed of the split.
        callbacks: The Trainer's callbacks; those with a method ``wrap_loaders`` may replace the clients' loaders.
        silo: The name of this launch in a federation over a network. None: there is no network.
        is_of_several: Whether a silo consists of several processes, which share its training data.

    Raises:
        MisconfigurationException: If the loader does not fit the settings or can't be split.
    """
    if is_of_several:
        population = _of_several(loader, group, num_clients, partition, seed, silo)
    elif silo is None:
        population = _find(loader, group, started_by_launcher, num_clients, partition, seed)
    elif isinstance(loader, ClientLoaders):
        raise MisconfigurationException(
            f"The training loader names {len(loader)} clients, but with FederatedStrategy(federation=...) this launch "
            "is one silo. Give one plain DataLoader."
        )
    else:
        population = Population.of_silo(silo, loader)
    for callback in callbacks:
        if hasattr(callback, "wrap_loaders"):
            population = population.with_loaders(callback.wrap_loaders(population.loaders))
    return population


def _of_several(
    loader: Any, group: Group, num_clients: int | None, partition: Partitioner | None, seed: int, silo: str | None
) -> Population:
    """This rank's silo; each of its processes reads an equal part of the examples."""
    if isinstance(loader, ClientLoaders) or num_clients is not None or partition is not None:
        found = f"the training loader names {len(loader)} clients" if isinstance(loader, ClientLoaders) else ""
        raise MisconfigurationException(
            "With FederatedStrategy(silo=...) the processes of a silo train one client together, but "
            f"{found or f'num_clients={num_clients} and partition={partition} ask for several'}. Give one plain "
            "DataLoader with the silo's data, or leave silo out."
        )
    try:
        own = share_among(loader, group.inner.rank, group.inner.size, seed)
    except ValueError as error:
        raise MisconfigurationException(str(error)) from error
    # A part may be padded with examples that another one has too.
    num_examples = min(len(loader.dataset), group.inner.size * (count_examples(own) or 0))
    if silo is not None:
        return Population.of_silo(silo, own, num_examples)
    return Population.of_ranks(own, group.rank, group.names or range(group.size), num_examples)


def _find(
    loader: Any,
    group: Group,
    started_by_launcher: bool,
    num_clients: int | None,
    partition: Partitioner | None,
    seed: int,
) -> Population:
    if isinstance(loader, ClientLoaders):
        if num_clients is not None or partition is not None:
            raise MisconfigurationException(
                f"The training loader already names {len(loader)} clients, so num_clients={num_clients} and "
                f"partition={partition} would be ignored. Leave them out, or give one plain DataLoader."
            )
        return Population(loader)
    if num_clients is None and partition is None and started_by_launcher and group.size > 1:
        return Population.of_ranks(loader, group.rank, group.names or range(group.size))
    if num_clients is None and not (partition and partition.names_clients):
        num_clients = DEFAULT_NUM_CLIENTS
        rank_zero_info(
            f"Simulating {num_clients} clients with equal random parts of the training data. Change it with "
            "FederatedStrategy(num_clients=..., partition=...)."
        )
    try:
        return Population(partition_loader(loader, partition or IID(), num_clients, seed))
    except ValueError as error:
        raise MisconfigurationException(str(error)) from error
