"""The strategy's argument ``topology``: what it makes of the algorithm and the cohorts, and what it refuses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lightning_fl.aggregation import Aggregator, Corruption, ElectedMean, Nodes, Transform, WeightedMean
from lightning_fl.algorithms import DSGD, Algorithm, Decentralized, FedAvg, PushSum, Weighting
from lightning_fl.clients import Cohort, RoundRobin, Uniform
from lightning_fl.topologies import Cyclic, Swarm, Topology


@dataclass(frozen=True)
class Placed:
    """The settings that a topology takes part in.

    Args:
        algorithm: The algorithm on the topology.
        weighting: How clients are weighted; None for the algorithm's own.
        cohort: How the clients of a round are chosen; None for uniformly.
        clients_per_round: How many take part.
    """

    algorithm: Algorithm
    weighting: Weighting | None
    cohort: Cohort | None
    clients_per_round: int | float | None


def place(settings: Placed, topology: Topology | None) -> Placed:
    """Puts an algorithm onto a topology.

    Raises:
        ValueError: If it is not one for topologies, or takes part in rounds in a way that the topology does not allow.
    """
    algorithm = settings.algorithm
    if isinstance(topology, Swarm):
        _check_has_one_model(algorithm, topology)
        return settings
    if isinstance(topology, Cyclic):
        if settings.cohort is not None or settings.clients_per_round is not None:
            raise ValueError(
                f"topology={topology!r} says who takes part in a round. Leave cohort and clients_per_round out."
            )
        _check_has_one_model(algorithm, topology)
        return replace(settings, cohort=RoundRobin(reverse=topology.reverse), clients_per_round=1)
    if topology is not None and algorithm == FedAvg():
        # Federated averaging over a graph: its weights stay those of federated averaging.
        return _whole(replace(settings, algorithm=DSGD(topology), weighting=settings.weighting or FedAvg.weighting))
    if topology is not None and not isinstance(algorithm, Decentralized):
        raise ValueError(
            f"{type(algorithm).__name__} has a server, so topology={topology!r} would be ignored. Use 'fedavg', "
            "'dsgd', 'd2', 'gradienttracking' or 'pushsum', or leave topology out."
        )
    if topology is not None and isinstance(algorithm, Decentralized):
        settings = replace(settings, algorithm=replace(algorithm, topology=topology))
    if isinstance(algorithm, PushSum) and settings.weighting == "examples":
        raise ValueError(
            "Push-sum gives all clients the same weight: weighting='examples' would be ignored. Leave it out."
        )
    return _whole(settings)


def _check_has_one_model(algorithm: Algorithm, topology: Topology) -> None:
    if algorithm.keeps_nodes:
        raise ValueError(
            f"topology={topology!r} has one model for all, and {type(algorithm).__name__} one per client. Use "
            "algorithm='fedavg'."
        )


def elect(topology: Topology | None, aggregator: Aggregator | None, is_in_real_time: bool) -> Aggregator | None:
    """The aggregator of a swarm, or what the user gives.

    Raises:
        ValueError: If updates do not go to the elected client.
    """
    if not isinstance(topology, Swarm):
        return aggregator
    if is_in_real_time:
        raise ValueError(
            f"topology={topology!r} elects who averages, but with federation or transport one party does for good. "
            "Leave one of them out."
        )
    if aggregator is not None:
        raise ValueError(
            f"topology={topology!r} averages on the elected client, so aggregator={aggregator!r} would be ignored. "
            "Leave one of them out."
        )
    return ElectedMean(topology)


def _whole(settings: Placed) -> Placed:
    chosen = settings.clients_per_round is not None or not isinstance(settings.cohort or Uniform(), Uniform)
    if settings.algorithm.keeps_nodes and chosen:
        raise ValueError(
            f"{type(settings.algorithm).__name__} mixes the models of all nodes in each round. Leave clients_per_round "
            "and cohort out."
        )
    return settings


def check_nodes(
    algorithm: Algorithm,
    aggregator: Aggregator | None,
    transforms: Sequence[Transform],
    adversary: Corruption | None,
    schedule: object | None,
    address: str | None,
) -> Aggregator:
    """The aggregator to use: what the user gives, else that of the algorithm.

    Raises:
        ValueError: If something stands between client and server, of which there is none.
    """
    name = type(algorithm).__name__
    if address is not None and (algorithm.knows_index or algorithm.keeps_nodes):
        raise ValueError(
            f"{name} counts the clients through, and a silo of a federation over a network knows no other. Use another "
            "algorithm, or start the silos with torchrun."
        )
    if not algorithm.keeps_nodes:
        return aggregator or WeightedMean()
    given = {
        "aggregator": aggregator,
        "transforms": tuple(transforms) or None,
        "adversary": adversary,
        "schedule": schedule,
    }
    found = [f"{key}={value!r}" for key, value in given.items() if value is not None and not isinstance(value, Nodes)]
    if found:
        raise ValueError(
            f"{name} has no server, between which and the clients {found[0]} could act: it would be ignored. Leave it "
            "out, or use an algorithm with a server."
        )
    return aggregator or Nodes()
