"""The life of a round without Lightning, over one rank and over several."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from lightning_fl.algorithms import Algorithm, FedAdam, FedAvg, FedDyn, FedNova, Scaffold
from lightning_fl.communication import Group
from lightning_fl.federation import RankReport, RoundResult
from lightning_fl.types import Tree
from tests.contract.helpers import run_threads
from tests.helpers.federation import Simulation, quadratics

CENTERS, STEEPNESS, WEIGHTS = [0.0, 1.0, 4.0], [1.0, 2.0, 0.5], [1.0, 2.0, 1.0]
PARAMS = {"x": torch.tensor(10.0, dtype=torch.float64)}


def federation(algorithm: Algorithm | None = None, spoilt: Sequence[int] = (), num_steps: Any = 5) -> Simulation:
    """Three clients; the gradients of those in ``spoilt`` are NaN."""
    gradients: list[Callable[[Tree], Tree]] = quadratics(CENTERS, STEEPNESS)
    for client in spoilt:
        gradients[client] = lambda params: {"x": params["x"] * float("nan")}
    return Simulation(algorithm or FedAvg(), gradients, PARAMS, num_steps, weights=WEIGHTS)


def facts(result: RoundResult) -> list[float]:
    report = result.report
    counts = [report.num_clients, report.weight, report.num_steps, report.num_examples]
    return [*counts, report.squared_norm, result.norm, result.spread]


def run(group: Group, algorithm: Algorithm, rounds: int = 3) -> tuple[dict[str, Any], list[list[float]]]:
    own = federation(algorithm, num_steps=[2, 5, 3])
    told = [facts(own.round([0, 1, 2] if index != 1 else [2, 0], group)) for index in range(rounds)]
    return dict(own.server), told


@pytest.mark.parametrize("algorithm", [FedAvg(), FedAdam(server_lr=0.1), FedNova()], ids=lambda a: type(a).__name__)
def test_any_number_of_ranks_gives_the_same(algorithm: Algorithm) -> None:
    """With four ranks one has no client."""
    (server, told), *_ = run_threads(1, lambda group: run(group, algorithm))
    for size in (2, 4):
        for found, own_facts in run_threads(size, lambda group: run(group, algorithm)):
            torch.testing.assert_close(found, server, rtol=1e-12, atol=1e-15)
            assert own_facts == [pytest.approx(expected, rel=1e-12) for expected in told]


@pytest.mark.parametrize("algorithm", [Scaffold(), FedDyn()], ids=lambda a: type(a).__name__)
def test_clients_with_state_stay_on_their_rank(algorithm: Algorithm) -> None:
    def train(group: Group) -> tuple[dict[str, Any], dict[int, Any]]:
        own = federation(algorithm)
        for _ in range(3):
            own.round(group=group)
        return dict(own.server), own.clients

    ((server, states),) = run_threads(1, train)
    for size in (2, 4):
        ranks = run_threads(size, train)
        for rank, (found, kept) in enumerate(ranks):
            torch.testing.assert_close(found, server, rtol=1e-12, atol=1e-15)
            assert sorted(kept) == [0, 1, 2][rank::size]
            torch.testing.assert_close(kept, {client: states[client] for client in kept}, rtol=1e-12, atol=1e-15)


def test_a_round_in_closed_form() -> None:
    own = federation(num_steps=1)
    result = own.round()
    deltas = [-0.1 * h * (10.0 - e) for h, e in zip(STEEPNESS, CENTERS, strict=True)]
    mean = sum(w * d for w, d in zip(WEIGHTS, deltas, strict=True)) / 4
    squares = sum(w * d**2 for w, d in zip(WEIGHTS, deltas, strict=True))
    assert own.x == pytest.approx(10 + mean, rel=1e-14)
    assert own.module.x.item() == own.x
    assert facts(result)[:4] == [3, 4.0, 3, 4]
    norms = [squares, abs(mean), 1 - mean**2 * 4 / squares]  # measured in float32
    assert facts(result)[4:] == pytest.approx(norms, rel=1e-6)
    assert set(result.seconds) == {"read", "train", "wait", "communicate", "server", "transform"}
    assert (result.num_bytes, result.hides_clients) == (0, False)
    assert (result.closing.stop_reason, result.closing.facts) == (None, {})


# ---- clients that give NaN


@pytest.mark.parametrize("algorithm", [FedAvg(), Scaffold()], ids=lambda a: type(a).__name__)
@pytest.mark.parametrize("size", [1, 2])
def test_a_client_that_gives_nan_is_as_if_it_were_not_there(size: int, algorithm: Algorithm) -> None:
    def train(group: Group) -> tuple[float, list[Any], list[int]]:
        own = federation(algorithm, spoilt=[1])
        result = own.round(group=group)
        return own.x, result.report.refused, sorted(own.clients)

    without = federation(algorithm)
    without.round([0, 2])
    for rank, (x, refused, kept) in enumerate(run_threads(size, train)):
        assert x == pytest.approx(without.x, rel=1e-12)
        assert refused == [1]
        assert kept == ([0, 2] if algorithm.keeps_client_state and rank == 0 else [])


def test_the_outcome_of_a_client_tells_whether_it_was_accepted() -> None:
    own = federation(spoilt=[1])
    opened = own.open([0, 1])
    good, bad = (own.train(opened, client) for client in (0, 1))
    assert (list(good.accepted), good.num_steps, good.update is not None) == ([True], 5, True)
    assert (list(bad.accepted), bad.num_steps, bad.update) == ([False], 5, None)
    assert math.isnan(bad.runs[0].loss)


@pytest.mark.parametrize("size", [1, 2])
def test_a_round_of_nothing_but_nan_is_an_error_on_every_rank(size: int) -> None:
    def train(group: Group) -> tuple[float, str]:
        own = federation(spoilt=[0, 1, 2])
        with pytest.raises(ValueError, match=r"Round 0 has no update left.*hold NaN or Inf") as error:
            own.round(group=group)
        return own.x, str(error.value)

    for x, message in run_threads(size, train):
        assert x == 10.0
        assert all(str(client) in message for client in (0, 1, 2))


# ---- rounds that do not end


def test_an_abandoned_round_leaves_nothing() -> None:
    own = federation(Scaffold())
    own.round()
    before = copy.deepcopy((dict(own.server), own.clients, own.module.state_dict()))
    opened = own.open([0, 1, 2])
    own.train(opened, 0)
    task = opened.start(own._data(1))
    batch, position = next(iter(task.batches))
    opened.step(task, batch, position)
    opened.abandon()
    torch.testing.assert_close((dict(own.server), own.clients, own.module.state_dict()), before, rtol=0, atol=0)
    unbroken = federation(Scaffold())
    assert own.rounds(1) == unbroken.rounds(2)


def test_a_client_that_is_left_counts_for_nothing() -> None:
    own, without = federation(), federation()
    opened = own.open([0, 1, 2])
    own.train(opened, 0)
    task = opened.start(own._data(1))
    batch, position = next(iter(task.batches))
    opened.step(task, batch, position)
    opened.leave()
    own.train(opened, 2)
    own.state = opened.close(opened.merge(RankReport())).state
    without.round([0, 2])
    assert own.x == without.x


def test_a_round_without_clients_leaves_the_model() -> None:
    own = federation(FedAdam())
    before = dict(own.server)
    result = own.round([])
    assert result.report.num_clients == 0
    assert own.server == before
    assert own.x == 10.0


# ---- randomness


class Draws(Simulation):
    """Notes a random number at each step."""

    drawn: dict[int, list[float]]

    def __init__(self) -> None:
        super().__init__(FedAvg(), quadratics(CENTERS, STEEPNESS), PARAMS, 2, weights=WEIGHTS)
        self.drawn = {}
        step = self.module.training_step

        def drawing(batch: Any, offset: int) -> Any:
            self.drawn.setdefault(int(batch), []).append(torch.rand(1).item())
            return step(batch, offset)

        self.trainer.functions = type(self.trainer.functions)(drawing)  # type: ignore[misc, call-arg]


def test_a_clients_random_numbers_depend_on_nobody_else() -> None:
    first, second = Draws(), Draws()
    state = torch.get_rng_state()
    first.round([0, 1, 2])
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    second.round([2, 1])
    assert first.drawn[1] == second.drawn[1]
    assert first.drawn[2] == second.drawn[2]
    assert len({value for values in first.drawn.values() for value in values}) == 6
    second.round([1])
    assert second.drawn[1][:2] != second.drawn[1][2:]
