"""What a rank does in a round, worked out before it begins."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from lightning_fl.aggregation import WeightedMean
from lightning_fl.algorithms import Algorithm, Ditto, FedAvg, FedRep
from lightning_fl.clients import Between, LocalWork, Participation, Population, Stragglers
from lightning_fl.communication import Group, LocalGroup
from lightning_fl.data.client_loaders import ClientLoaders
from lightning_fl.federation import FederationSettings, LoaderFailed, Planner, RankPlan
from tests.contract.helpers import run_threads

SIZES = {"a": 7, "b": 4, "c": 9, "d": 1, "e": 12}


def batches(size: int) -> DataLoader:
    return DataLoader(torch.arange(float(size)), batch_size=4)  # type: ignore[arg-type]


class Stream(IterableDataset[Any]):
    """Data without a length."""

    def __iter__(self) -> Any:
        return iter(range(5))


def no_loader() -> Any:
    raise OSError("the disk is gone")


def planner(
    group: Group | None = None,
    algorithm: Algorithm | None = None,
    clients: dict[str, Any] | None = None,
    describe: Any = str,
    **participation: Any,
) -> Planner:
    algorithm = algorithm or FedAvg()
    loaders = ClientLoaders({name: batches(size) for name, size in SIZES.items()} if clients is None else clients)
    settings = FederationSettings(algorithm, WeightedMean(), (), "examples", 3, population=len(loaders))
    taking_part = Participation(**participation)
    return Planner(Population(loaders), taking_part, settings, group or LocalGroup(), describe)


def plan(own: Planner, index: int = 0, **work: Any) -> RankPlan:
    return own.plan(index, LocalWork(**work))


def test_each_client_trains_alone_in_order_with_known_sizes() -> None:
    planned = plan(planner(), 2)
    assert planned.round == 2
    assert planned.cohort == list(SIZES)
    assert planned.groups == [(client,) for client in SIZES]
    assert planned.clients == list(SIZES)
    assert planned.sizes == SIZES
    assert planned.lengths == {"a": 2, "b": 1, "c": 3, "d": 1, "e": 3}
    assert (planned.empty, planned.failed, planned.dropped, planned.loaders) == ([], {}, [], {})
    assert [planned.num_batches(group) for group in planned.planned] == [2, 1, 3, 1, 3]


@pytest.mark.parametrize(
    ("work", "algorithm", "expected"),
    [
        ({"epochs": 3}, FedAvg(), [6, 3, 9, 3, 9]),
        ({"steps": 5}, FedAvg(), [5, 5, 5, 5, 5]),
        ({"steps": 2, "accumulate": 3}, FedAvg(), [6, 6, 6, 6, 6]),
        ({"limit": 2}, FedAvg(), [2, 1, 2, 1, 2]),
        ({}, Ditto(own_epochs=2), [6, 3, 9, 3, 9]),
        ({}, FedRep(head_epochs=4), [10, 5, 15, 5, 15]),
    ],
    ids=str,
)
def test_lengths_are_those_of_all_phases(work: dict[str, Any], algorithm: Algorithm, expected: list[int]) -> None:
    assert list(plan(planner(algorithm=algorithm), **work).lengths.values()) == expected


def test_data_without_a_length_shows_only_in_training() -> None:
    clients = {"a": DataLoader(Stream(), batch_size=2), "b": batches(4)}
    planned = plan(planner(clients=clients))
    assert planned.lengths == {"a": None, "b": 1}
    assert planned.sizes == {"a": None, "b": 4}
    assert planned.num_batches(planned.planned[0]) is None
    by_steps = plan(planner(clients=clients), steps=3)
    assert by_steps.lengths == {"a": 3, "b": 3}


def test_clients_without_data_or_loader_are_set_apart() -> None:
    told: list[LoaderFailed] = []

    def describe(failed: LoaderFailed) -> str:
        told.append(failed)
        return "a word on it"

    clients = {"a": [], "b": batches(4), "c": no_loader}
    planned = plan(planner(clients=clients, describe=describe))
    assert planned.cohort == ["a", "b", "c"]
    assert planned.groups == [("b",)]
    assert planned.empty == ["a"]
    assert planned.failed == {"c": "a word on it"}
    assert [(failed.client, str(failed.error)) for failed in told] == [("c", "the disk is gone")]


def test_a_failure_that_is_raised_ends_the_planning() -> None:
    def describe(failed: LoaderFailed) -> str:
        raise failed.error

    with pytest.raises(OSError, match="the disk is gone"):
        plan(planner(clients={"c": no_loader}, describe=describe))


def test_stragglers_are_dropped_or_do_less() -> None:
    dropping = plan(planner(stragglers=Stragglers(0.5, policy="drop")))
    assert dropping.dropped
    assert sorted([*dropping.dropped, *dropping.cohort]) == list(SIZES)
    slow = plan(planner(stragglers=Stragglers(0.5)), epochs=4)
    assert slow.cohort == list(SIZES)
    assert any(work.part < 1 for work in slow.works.values())


def test_a_round_is_planned_from_its_number() -> None:
    first, again = (plan(planner(clients_per_round=2, local_epochs=Between(1, 4)), 6, epochs=4) for _ in range(2))
    assert (first.cohort, first.works) == (again.cohort, again.works)
    own = planner(clients_per_round=2)
    assert len({tuple(plan(own, index).cohort) for index in range(20)}) > 3


@pytest.mark.parametrize("sticky", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_ranks_share_the_cohort(size: int, sticky: bool) -> None:
    plans = run_threads(size, lambda group: planner(group, clients_per_round=4).plan(1, LocalWork(), sticky=sticky))
    assert all(own.cohort == plans[0].cohort and own.works == plans[0].works for own in plans)
    trained = [client for own in plans for client in own.clients]
    assert sorted(trained) == sorted(plans[0].cohort)
    if sticky:
        homes = {client: rank for rank, own in enumerate(plans) for client in own.clients}
        assert all(rank == list(SIZES).index(client) % size for client, rank in homes.items())


@pytest.mark.parametrize(
    ("work", "expected"),
    [({}, 3), ({"epochs": 2}, 6), ({"accumulate": 2}, 4), ({"steps": 5}, 5), ({"steps": 5, "accumulate": 2}, 10)],
    ids=str,
)
@pytest.mark.parametrize("size", [1, 2])
def test_the_largest_client_counts_for_schedules(size: int, work: dict[str, Any], expected: int) -> None:
    assert run_threads(size, lambda group: planner(group).largest_num_batches(LocalWork(**work))) == [expected] * size


def test_the_largest_client_is_unknown_where_a_loader_has_no_length() -> None:
    clients = {"a": DataLoader(Stream(), batch_size=2), "b": batches(4)}
    assert planner(clients=clients).largest_num_batches(LocalWork()) == float("inf")
    assert planner(clients=clients).largest_num_batches(LocalWork(steps=3)) == 3


class Pairs:
    """Puts two neighbours together; groups of clients with different work take as many steps as both."""

    max_clients = 2

    def __init__(self) -> None:
        self.seen: dict[Any, Any] = {}

    def group(self, forecasts: Any) -> list[list[Any]]:
        self.seen = dict(forecasts)
        clients = list(forecasts)
        return [clients[start : start + 2] for start in range(0, len(clients), 2)]

    def num_steps(self, forecasts: Any) -> int | None:
        works = [forecast.work for forecast in forecasts]
        return None if len(set(works)) == 1 else sum(map(len, works))


def test_clients_are_put_together_as_the_grouping_says() -> None:
    pairs: Any = Pairs()
    planned = planner().plan(0, LocalWork(epochs=2), pairs)
    assert planned.groups == [("a", "b"), ("c", "d"), ("e",)]
    assert pairs.seen["a"].work == (4, 3, 4, 3)
    assert [group.num_steps for group in planned.planned] == [6, 8, None]
    assert [planned.num_batches(group) for group in planned.planned] == [6, 8, 6]
    assert list(planned.loaders) == ["a", "b"]
