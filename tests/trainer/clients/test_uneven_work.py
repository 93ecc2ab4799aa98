"""Uneven local work through the real Trainer: closed forms, weights, schedules."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
from lightning.pytorch import LightningModule

import lightning_fl as fl
from lightning_fl import FederatedStrategy
from lightning_fl.algorithms import FedNova, FedProx
from lightning_fl.clients import Between, PerClient, Stragglers
from tests.helpers.training import Plain, image_clients, loader, minimise, quadratic_clients, trainer

CENTERS, STEEPNESS, SHARES, LR = (0.0, 1.0, 4.0), (1.0, 2.0, 0.5), (0.25, 0.5, 0.25), 0.1
EQUAL = (1.0, 1.0, 1.0)
UNEVEN = PerClient({0: 1, 1: 2, 2: 5})


class Runs(fl.callbacks.FederatedCallback):
    """Which client took how many steps with which weight, by round."""

    def __init__(self) -> None:
        self.rounds: list[dict[Any, tuple[int, float]]] = []

    def on_round_start(self, trainer: Any, module: Any, round: int, cohort: Any) -> None:
        self.rounds.append({})

    def on_client_end(self, trainer: Any, module: Any, client: Any, run: Any, update: Any) -> None:
        self.rounds[-1][client] = run.num_steps, run.weight


def pull(steepness: float, num_steps: int, mu: float = 0.0, lr: float = LR) -> float:
    """How far of the way to its centre a client goes."""
    return (1 - (1 - lr * (steepness + mu)) ** num_steps) * steepness / (steepness + mu)


def fixed_point(pulls: Sequence[float], shares: Sequence[float] = SHARES) -> float:
    weights = [p * s for p, s in zip(shares, pulls, strict=True)]
    return sum(w * e for w, e in zip(weights, CENTERS, strict=True)) / sum(weights)


@pytest.mark.parametrize(
    ("algorithm", "expected"),
    [
        ("fedavg", 1.5530937145),
        ("fednova", 1.0707211776),
    ],
)
@pytest.mark.spread(1)
def test_fedavg_is_biased_by_uneven_steps_and_fednova_is_not(algorithm: str, expected: float) -> None:
    assert minimise(FederatedStrategy(algorithm, local_steps=UNEVEN), 90) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize(("algorithm", "optimum"), [("fedavg", 2.0), ("fednova", 1.5)])
@pytest.mark.spread(1)
def test_with_small_steps_fednova_is_exact_and_fedavg_goes_elsewhere(algorithm: str, optimum: float) -> None:
    """Work of 1, 2 and 5 passes pulls FedAvg to ``sum p tau e / sum p tau``; with FedNova only the weights count."""
    lr, passes = 0.001, {0: 1, 1: 2, 2: 3}
    clients = quadratic_clients(h=EQUAL)
    found = minimise(FederatedStrategy(algorithm, local_epochs=PerClient(passes)), 100, clients, lr=lr)
    start = 10.0
    pulls = [pull(1.0, n, lr=lr) for n in passes.values()]
    if algorithm == "fednova":
        mean = sum(p * n for p, n in zip(SHARES, passes.values(), strict=True))
        pulls = [mean * s / n for s, n in zip(pulls, passes.values(), strict=True)]
    limit = fixed_point(pulls)
    rate = 1 - sum(p * s for p, s in zip(SHARES, pulls, strict=True))
    assert found == pytest.approx(limit + (start - limit) * rate**100, rel=1e-9)
    assert limit == pytest.approx(optimum, abs=3e-3)


@pytest.mark.parametrize("mu", [0.1, 1.0])
@pytest.mark.spread(1)
def test_fedprox_settles_at_its_fixed_point_under_uneven_work(mu: float) -> None:
    found = minimise(FederatedStrategy(FedProx(mu), local_steps=UNEVEN), 90)
    expected = fixed_point([pull(h, n, mu) for h, n in zip(STEEPNESS, (1, 2, 5), strict=True)])
    assert found == pytest.approx(expected, rel=1e-8)
    without = fixed_point([pull(h, n) for h, n in zip(STEEPNESS, (1, 2, 5), strict=True)])
    assert abs(found - without) > 1e-3


OPTIONS: dict[str, dict[str, Any]] = {
    "epochs": {"local_epochs": Between(1, 6)},
    "steps": {"local_steps": Between(1, 6)},
    "partial": {"local_epochs": 6, "stragglers": Stragglers(0.6)},
    "dropped": {"local_epochs": 3, "stragglers": Stragglers(0.4, "drop")},
    "both": {"local_steps": Between(2, 6), "stragglers": Stragglers(0.4)},
}


@pytest.mark.parametrize("algorithm", [FedProx(0.0), FedProx(0.7), FedNova(), FedNova(mu=0.7)], ids=repr)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.spread(5)
def test_random_work_takes_the_steps_of_the_recursion(algorithm: Any, options: str) -> None:
    """Twelve rounds with the numbers of steps that were drawn, worked out by hand."""
    runs = Runs()
    found = minimise(FederatedStrategy(algorithm, **OPTIONS[options]), 12, callbacks=[runs])
    x = 10.0
    for taken in runs.rounds:
        total = sum(weight for _, weight in taken.values())
        change = work = 0.0
        for client, (num_steps, weight) in taken.items():
            assert weight == (1, 2, 1)[client]
            moved = pull(STEEPNESS[client], num_steps, algorithm.mu) * (CENTERS[client] - x)
            decay = LR * algorithm.mu
            a = (1 - (1 - decay) ** num_steps) / decay if decay else num_steps
            a = a if isinstance(algorithm, FedNova) else 1.0
            change, work = change + weight / total * moved / a, work + weight / total * a
        x += work * change
    assert found == pytest.approx(x, rel=1e-12)
    assert len({taken[client][0] for taken in runs.rounds for client in taken}) > (0 if options == "dropped" else 3)
    assert {len(taken) for taken in runs.rounds} == ({1, 2} if options == "dropped" else {3})


def test_a_dropped_straggler_does_not_train_and_is_named() -> None:
    runs, strategy = Runs(), FederatedStrategy(stragglers=Stragglers(0.5, "drop"))
    minimise(strategy, 10, callbacks=[runs])
    for entry, taken in zip(strategy.history, runs.rounds, strict=True):
        assert sorted([*entry["dropped"], *taken]) == [0, 1, 2]
        assert entry["num_clients"] == len(taken)
    assert any(entry["dropped"] for entry in strategy.history)


@pytest.mark.parametrize("options", [{"local_epochs": 1}, {"local_epochs": 3}, {"local_steps": 3}], ids=repr)
def test_a_clients_weight_is_its_examples_however_little_it_trains(options: dict[str, Any]) -> None:
    runs, strategy = Runs(), FederatedStrategy(stragglers=Stragglers(1.0), **options)
    trainer(strategy, 6, callbacks=[runs]).fit(Plain(), image_clients((8, 20, 41)))
    passes = options.get("local_epochs")
    for taken in runs.rounds:
        assert [weight for _, weight in taken.values()] == [8, 20, 41]
        for client, num_batches in enumerate((2, 5, 11)):
            assert 1 <= taken[client][0] <= (options.get("local_steps") or num_batches * passes)
    assert len({taken[2][0] for taken in runs.rounds}) > (1 if passes is None else 3)


def test_a_straggler_stops_within_a_pass_at_a_whole_window() -> None:
    runs = Runs()
    strategy = FederatedStrategy(num_clients=1, stragglers=Stragglers(1.0))
    trainer(strategy, 30, callbacks=[runs], accumulate_grad_batches=2).fit(Plain(), loader(28))
    assert {taken[0][0] for taken in runs.rounds} == {1, 2, 3, 4}


class Estimates(Plain):
    def configure_optimizers(self) -> Any:
        self.estimate = self.trainer.estimated_stepping_batches
        return super().configure_optimizers()


@pytest.mark.parametrize(
    ("options", "per_round"),
    [
        ({"local_epochs": Between(1, 3)}, 33),
        ({"local_steps": Between(1, 3)}, 3),
        ({"local_epochs": 2, "stragglers": Stragglers(1.0)}, 22),
        ({"local_steps": PerClient({0: 9}, default=2)}, 9),
    ],
    ids=repr,
)
def test_schedules_are_made_for_the_most_work(options: dict[str, Any], per_round: int) -> None:
    module: LightningModule = Estimates()
    trainer(FederatedStrategy(**options), 4).fit(module, image_clients((8, 20, 41)))
    assert module.estimate == 4 * per_round


def test_epochs_by_client_pass_over_all_of_its_data() -> None:
    seen: dict[int, int] = {}

    class Counts(fl.callbacks.FederatedCallback):
        def on_client_start(self, trainer: Any, module: Any, client: Any) -> None:
            self.client = client

        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            seen[self.client] = seen.get(self.client, 0) + len(batch[0])

    strategy = FederatedStrategy(local_epochs=PerClient({0: 3, 1: 1}))
    trainer(strategy, callbacks=[Counts()]).fit(Plain(), image_clients((7, 13)))
    assert seen == {0: 21, 1: 13}
    assert strategy.history[0]["num_steps"] == 3 * math.ceil(7 / 4) + math.ceil(13 / 4)
