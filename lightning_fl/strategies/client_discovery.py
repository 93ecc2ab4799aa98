"""Finds the federation's clients from the user's training loader."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_fl.clients import Population
from lightning_fl.communication import Group
from lightning_fl.data.client_loaders import ClientLoaders
from lightning_fl.data.partitioners.partitioner import DEFAULT_NUM_CLIENTS, IID, Partitioner
from lightning_fl.data.splitting import partition_loader


def build_population(
    loader: Any,
    group: Group,
    started_by_launcher: bool,
    num_clients: int | None,
    partition: Partitioner | None,
    seed: int,
    callbacks: Sequence[Any] = (),
    silo: str | None = None,
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

    Raises:
        MisconfigurationException: If the loader does not fit the settings or can't be split.
    """
    if silo is None:
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
