"""How much each client trains: amounts, stragglers, and what all ranks draw alike."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from lightning_fl.clients import (
    Amount,
    Between,
    Participation,
    ParticipationSampler,
    PerClient,
    Poisson,
    Population,
    Stragglers,
    Uniform,
)
from lightning_fl.clients.local_work import LocalWork
from lightning_fl.communication import LocalGroup, Message
from lightning_fl.data.client_loaders import ClientLoaders
from lightning_fl.types import ClientId


def draws(
    participation: Participation, num_clients: int = 10, seed: int = 0, group: Any = None
) -> ParticipationSampler:
    population = Population(ClientLoaders(range(num_clients), lambda client: []))
    return ParticipationSampler(participation, population, seed, group or LocalGroup())


def works(participation: Participation, round: int, num_clients: int = 10, seed: int = 0) -> dict[ClientId, LocalWork]:
    drawn = draws(participation, num_clients, seed)
    return dict(drawn.works(round, drawn.cohort(round), participation.max_work()))


def test_without_a_word_all_clients_do_one_pass() -> None:
    participation = Participation()
    assert participation.is_even
    assert works(participation, 0) == dict.fromkeys(range(10), LocalWork(1))


@pytest.mark.parametrize("name", ["local_epochs", "local_steps"])
def test_an_amount_stands_where_a_number_may_stand(name: str) -> None:
    participation = Participation(**{name: Between(2, 5)})
    assert not participation.is_even
    amounts = Counter(
        work.steps if name == "local_steps" else work.epochs
        for round in range(400)
        for work in works(participation, round).values()
    )
    assert amounts.keys() == {2, 3, 4, 5}
    statistic = sum((count - 1000) ** 2 / 1000 for count in amounts.values())
    assert statistic < 21.1  # chi-square with 3 degrees of freedom: p > 1e-4
    most = participation.max_work(limit=3)
    assert (most.steps if name == "local_steps" else most.epochs, most.limit) == (5, 3)


def test_fast_and_slow_clients_are_so_in_all_rounds() -> None:
    participation = Participation(local_steps=PerClient({2: 7, 0: 1}, default=3))
    for round in range(3):
        assert [work.steps for work in works(participation, round, 4).values()] == [1, 3, 7, 3]
    assert participation.max_work().steps == 7


@pytest.mark.parametrize(
    ("amount", "message"),
    [
        (PerClient({0: 1, 1: 2}), "does not name client 2"),
        (PerClient({0: 1, 9: 2}, default=1), "names client 9, which is not in the federation"),
    ],
)
def test_amounts_that_do_not_fit_the_clients_are_refused(amount: Amount, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draws(Participation(local_epochs=amount), 3)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Between(0, 3),
        lambda: Between(3, 2),
        lambda: Between(1.0, 2),
        lambda: Between(True, 2),
        lambda: PerClient({0: 0}),
        lambda: PerClient({0: 1.5}),
        lambda: PerClient([1, 2]),
        lambda: PerClient({0: 1}, default=0),
        lambda: Stragglers(-0.1),
        lambda: Stragglers(1.1),
        lambda: Stragglers(float("nan")),
        lambda: Stragglers(0.5, policy="late"),
        lambda: Stragglers(1.0, policy="drop"),
        lambda: Poisson(0.0),
        lambda: Poisson(1.1),
    ],
)
def test_what_is_out_of_range_is_refused(make: Any) -> None:
    with pytest.raises(ValueError, match=r"expected|must hold|leaves no client"):
        make()


def test_partial_work_is_uniform_from_one_step_to_all() -> None:
    participation = Participation(local_steps=5, stragglers=Stragglers(1.0))
    steps: Counter[int | None] = Counter()
    for round in range(400):
        steps.update(work.num_steps(3) for work in works(participation, round).values())
    assert steps.keys() == {1, 2, 3, 4, 5}
    assert sum((count - 800) ** 2 / 800 for count in steps.values()) < 23.6  # 4 degrees of freedom: p > 1e-4


def test_a_share_of_the_cohort_straggles_and_each_client_equally_often() -> None:
    participation = Participation(stragglers=Stragglers(0.9, policy="drop"))
    left = [list(works(participation, round)) for round in range(2000)]
    assert {len(clients) for clients in left} == {1}
    counts = Counter(client for clients in left for client in clients)
    assert sum((counts[client] - 200) ** 2 / 200 for client in range(10)) < 33.7  # 9 degrees of freedom: p > 1e-4


def test_a_share_that_is_no_whole_number_of_clients_is_right_on_average() -> None:
    participation = Participation(stragglers=Stragglers(0.5, policy="drop"))
    sizes = np.array([len(works(participation, round, num_clients=3)) for round in range(4000)])
    assert set(sizes) == {1, 2}
    assert abs(sizes.mean() - 1.5) < 4 * 0.5 / 4000**0.5


def test_no_stragglers_are_none() -> None:
    for policy in ("partial", "drop"):
        assert works(Participation(stragglers=Stragglers(0.0, policy)), 0) == works(Participation(), 0)


def test_draws_are_functions_of_seed_and_round() -> None:
    participation = Participation(Poisson(0.5), local_epochs=Between(1, 9), stragglers=Stragglers(0.5))
    assert works(participation, 3) == works(participation, 3)
    assert works(participation, 3) != works(participation, 4)
    assert works(participation, 3) != works(participation, 3, seed=1)


def test_runs_that_differ_in_policy_have_the_same_stragglers() -> None:
    for round in range(20):
        partial, drop = (
            works(Participation(local_epochs=20, stragglers=Stragglers(0.4, policy)), round)
            for policy in ("partial", "drop")
        )
        assert [client for client, work in partial.items() if work.part == 1] == list(drop)


class Told(LocalGroup):
    """The second of two ranks; rank 0 tells it a cohort."""

    def __init__(self, cohort: list[int]) -> None:
        super().__init__()
        self.rank, self.size, self.own = 1, 2, Message()
        self.told = Message(tensors={"cohort": torch.tensor(cohort)})

    def all_gather(self, message: Message, topic: str = "") -> list[Message]:
        self.own = message
        return [self.told, message]


@pytest.mark.parametrize(
    "participation", [Participation(Poisson(0.5, secure=True)), Participation(Uniform(), 5, secure=True)]
)
def test_a_secure_cohort_is_drawn_on_rank_0_and_told(participation: Participation) -> None:
    group = Told([1, 4, 7])
    drawn = draws(participation, group=group)
    assert drawn.cohort(0) == [1, 4, 7]
    assert group.own == Message()
    group.told = Message(tensors={"cohort": torch.tensor([], dtype=torch.int64)})
    assert drawn.cohort(0) == [1, 4, 7]
    assert drawn.cohort(1) == []
