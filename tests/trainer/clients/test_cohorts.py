"""Cohorts through the real Trainer: rounds without clients, ranks, resume, randomness that can't be foretold."""

from __future__ import annotations

import copy
import logging
import os
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

import lightning_fl as fl
from lightning_fl import FederatedStrategy
from lightning_fl.aggregation import RoundContext, Transform
from lightning_fl.clients import Between, PerClient, Poisson, RoundRobin, Stragglers, Uniform, Weighted
from lightning_fl.types import Aggregate, State
from tests.helpers.training import Ordinary, Plain, image_clients, loader, minimise, trainer, weights

NUM_CLIENTS = [1, 0, 3, 0, 2, 0]  # of 4 clients with Poisson(0.2) and seed 0 in rounds 0 to 5


class Cohorts(fl.callbacks.FederatedCallback):
    def __init__(self) -> None:
        self.cohorts: list[list[Any]] = []
        self.trained: list[Any] = []
        self.models: list[Tensor] = []

    def on_round_start(self, trainer: Any, module: Any, round: int, cohort: Any) -> None:
        self.cohorts.append(list(cohort))
        self.models.append(weights(module))

    def on_client_start(self, trainer: Any, module: Any, client: Any) -> None:
        self.trained.append(client)

    def on_aggregate_end(self, trainer: Any, module: Any, aggregate: Aggregate) -> None:
        assert all(torch.isfinite(change).all() for change in aggregate.mean().values())


def sometimes_nobody(algorithm: Any = "fedavg", rounds: int = 6, **kwargs: Any) -> tuple[Any, Any, Cohorts]:
    module, cohorts = Ordinary(torch.float64), Cohorts()
    options = {key: kwargs.pop(key) for key in ("transforms", "cohort", "client_optimizer") if key in kwargs}
    strategy = FederatedStrategy(algorithm, **{"cohort": Poisson(0.2), **options})
    run = trainer(strategy, rounds, **{"callbacks": [cohorts, *kwargs.pop("callbacks", [])], **kwargs})
    run.fit(module, image_clients((3, 9, 11, 40), validate=True))
    return run, module, cohorts


@pytest.mark.parametrize("algorithm", ["fedavg", "fedavgm", "fedadam", "scaffold", "fednova", "feddyn", "fedexp"])
@pytest.mark.filterwarnings("ignore:SCAFFOLD's control variate is derived for plain SGD")
def test_a_round_without_clients_leaves_everything_as_it_is(algorithm: str) -> None:
    module, cohorts = Plain(), Cohorts()
    strategy = FederatedStrategy(algorithm, cohort=Poisson(0.2))
    run = trainer(strategy, 6, callbacks=[cohorts])
    states = []

    class States(fl.callbacks.FederatedCallback):
        def on_round_start(self, trainer: Any, module: Any, round: int, cohort: Any) -> None:
            states.append(copy.deepcopy(strategy.active_driver.state.server))

    run.callbacks.append(States())
    run.fit(module, image_clients((3, 9, 11, 40)))
    models = [*cohorts.models, weights(module)]
    states.append(strategy.active_driver.state.server)
    assert [len(cohort) for cohort in cohorts.cohorts] == NUM_CLIENTS
    for round, size in enumerate(NUM_CLIENTS):
        assert torch.equal(models[round], models[round + 1]) == (size == 0)
        if size == 0:
            torch.testing.assert_close(states[round + 1], states[round], rtol=0, atol=0)
    assert [entry["num_clients"] for entry in strategy.history] == NUM_CLIENTS
    assert all(entry["update_norm"] == entry["update_spread"] == 0 for entry in strategy.history[1::2])


def test_a_round_without_clients_is_said_and_counted(caplog: Any, tmp_path: Any) -> None:
    with caplog.at_level(logging.INFO):
        run, _, _ = sometimes_nobody(logger=CSVLogger(tmp_path, version=""), callbacks=[LearningRateMonitor()])
    assert [m for m in caplog.messages if "no client takes part" in m] == [
        f"Round {round}: no client takes part." for round in (1, 3, 5)
    ]
    assert run.current_epoch == 6
    assert run.global_step == sum(entry["num_steps"] for entry in run.strategy.history)
    assert torch.isfinite(run.callback_metrics["loss"])
    logged = (tmp_path / "lightning_logs" / "metrics.csv").read_text().splitlines()
    column = logged[0].split(",").index("fl/num_clients")
    assert [int(float(n)) for line in logged[1:] if (n := line.split(",")[column])] == NUM_CLIENTS


def test_a_schedule_by_step_waits_through_rounds_without_clients() -> None:
    run, _, _ = sometimes_nobody()
    per_round = [entry["num_steps"] for entry in run.strategy.history]
    assert [steps == 0 for steps in per_round] == [size == 0 for size in NUM_CLIENTS]
    scheduler = run.lr_scheduler_configs[0].scheduler
    assert scheduler.T_max == 60  # the largest client has 40 examples in batches of 4, and there are 6 rounds
    assert scheduler.last_epoch == 30  # it took part in 3 of them


class Noise(Transform):
    """Releases noise in each round as client-level differential privacy does, also without any client."""

    needs_secure_sampling = False

    def __init__(self) -> None:
        self.seen: list[tuple[float, Any]] = []

    def server(self, aggregate: Aggregate, state: State, ctx: RoundContext) -> tuple[Aggregate, State]:
        self.seen.append((aggregate.weight, ctx.sampling))
        assert ctx.sampling is not None
        generator = torch.Generator().manual_seed(ctx.round)
        noisy = {
            name: total + torch.randn(total.shape, generator=generator, dtype=total.dtype)
            for name, total in aggregate.delta.items()
        }
        return replace(aggregate, delta=noisy, weight=ctx.sampling.size), state


def test_a_transform_may_release_noise_where_there_is_no_client() -> None:
    noise = Noise()
    _, module, cohorts = sometimes_nobody(transforms=[noise])
    models = [*cohorts.models, weights(module)]
    assert not any(torch.equal(before, after) for before, after in pairwise(models))
    assert all(torch.isfinite(model).all() for model in models)
    assert [weight == 0 for weight, _ in noise.seen] == [size == 0 for size in NUM_CLIENTS]
    sampling = noise.seen[0][1]
    assert (sampling.kind, sampling.rate, sampling.size, sampling.num_clients) == ("poisson", 0.2, 0.8, 4)


def test_clients_without_data_may_be_a_whole_cohort() -> None:
    clients = image_clients((3, 0, 0, 0))
    module = Plain()
    strategy = FederatedStrategy(cohort=RoundRobin(), clients_per_round=1)
    with pytest.warns(UserWarning, match="has no data"):
        trainer(strategy, 4).fit(module, clients)
    assert [entry["num_clients"] for entry in strategy.history] == [1, 0, 0, 0]
    assert [entry["empty"] for entry in strategy.history] == [[], [1], [2], [3]]


# ---- ranks and resume

OPTIONS: dict[str, dict[str, Any]] = {
    "poisson": {"cohort": Poisson(0.2), "local_epochs": Between(1, 3)},
    "weighted, partial": {
        "cohort": Weighted(),
        "clients_per_round": 2,
        "stragglers": Stragglers(0.5),
        "weighting": "uniform",
    },
    "turns, dropped": {
        "algorithm": "scaffold",
        "cohort": RoundRobin(),
        "clients_per_round": 2,
        "local_steps": PerClient({0: 1}, default=4),
        "stragglers": Stragglers(0.5, "drop"),
    },
}


def train_all(secure: bool = False) -> dict[str, tuple[Tensor, dict[str, float], list[Any]]]:
    found = {}
    for name, options in OPTIONS.items():
        module = Plain() if "algorithm" in options else Ordinary(torch.float64)
        cohort = replace(options["cohort"], rate=0.4, secure=True) if secure else options["cohort"]
        strategy = FederatedStrategy(**{**options, "cohort": cohort})
        run = trainer(strategy, 6, limit_val_batches=0)
        run.fit(module, image_clients((3, 9, 11, 40), validate="algorithm" not in options))
        metrics = {key: value.item() for key, value in run.callback_metrics.items()}
        found[name] = weights(module), metrics, [(e["num_steps"], e["dropped"]) for e in strategy.history]
        if secure:
            break
    return found


def test_two_ranks_train_what_one_does(run_ranks: Any) -> None:
    alone = train_all()
    assert [entry[0] == 0 for entry in alone["poisson"][2]] == [size == 0 for size in NUM_CLIENTS]
    for found in run_ranks(2, train_all):
        for name, (model, metrics, history) in alone.items():
            torch.testing.assert_close(found[name][0], model, rtol=1e-9, atol=1e-11)
            assert found[name][1] == pytest.approx(metrics, rel=1e-6)
            assert found[name][2] == history


def test_ranks_agree_on_a_secure_cohort(run_ranks: Any) -> None:
    one, other = run_ranks(2, train_all, secure=True)
    assert torch.equal(one["poisson"][0], other["poisson"][0])
    assert one["poisson"][2] == other["poisson"][2]


def train_silos() -> tuple[Tensor, list[Any]]:
    module, rank = Plain(), int(os.environ["RANK"])
    strategy = FederatedStrategy(cohort=Poisson(0.5), local_epochs=Between(1, 3), seed=1)
    trainer(strategy, 6).fit(module, loader(8 + 8 * rank, seed=rank))
    return weights(module), [(entry["num_clients"], entry["num_steps"]) for entry in strategy.history]


def test_silos_are_drawn_too(run_ranks: Any) -> None:
    one, other = run_ranks(2, train_silos)
    assert torch.equal(one[0], other[0])
    assert one[1] == other[1]
    assert {num_clients for num_clients, _ in one[1]} == {0, 1, 2}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_it_goes_on_exactly(name: str) -> None:
    def fit(**kwargs: Any) -> tuple[FederatedStrategy, Tensor]:
        module, strategy = Plain(), FederatedStrategy(**OPTIONS[name])
        trainer(strategy, 6, **{key: value for key, value in kwargs.items() if key != "ckpt_path"}).fit(
            module, image_clients((3, 9, 11, 40)), ckpt_path=kwargs.get("ckpt_path")
        )
        return strategy, weights(module)

    callback = ModelCheckpoint("ckpt", filename="{epoch}", save_top_k=-1)
    strategy, whole = fit(callbacks=[callback], enable_checkpointing=True)
    for epoch in (0, 2, 4):
        resumed, found = fit(ckpt_path=f"ckpt/epoch={epoch}.ckpt")
        assert torch.equal(found, whole)
        keys = ("num_clients", "num_steps", "dropped")
        for entry, expected in zip(resumed.history, strategy.history, strict=True):
            assert [entry[key] for key in keys] == [expected[key] for key in keys]


# ---- secure sampling


class Asks(Transform):
    needs_secure_sampling = True


@pytest.mark.parametrize(
    ("options", "is_secure"),
    [
        ({"cohort": Poisson(0.5)}, False),
        ({"cohort": Poisson(0.5, secure=True)}, True),
        ({"cohort": Poisson(0.5), "transforms": [Asks()]}, True),
        ({"clients_per_round": 6, "transforms": [Asks()]}, True),
    ],
)
@pytest.mark.spread(2)
def test_a_cohort_is_secure_if_it_or_a_transform_says_so(options: dict[str, Any], is_secure: bool) -> None:
    runs = []
    for _ in range(2):
        callback, strategy = Cohorts(), FederatedStrategy(**options)
        trainer(strategy, 5, callbacks=[callback]).fit(Plain(), image_clients([2] * 12))
        assert strategy.active_driver.planner.sampler.is_secure == is_secure
        assert callback.trained == [client for cohort in callback.cohorts for client in cohort]
        runs.append(callback.cohorts)
    assert (runs[0] == runs[1]) == (not is_secure)


# ---- what a user types


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"cohort": {"class_path": "Poisson", "init_args": {"rate": 0.01}}}, {"cohort": Poisson(0.01)}),
        (
            {"cohort": {"class_path": "lightning_fl.clients.RoundRobin"}, "clients_per_round": 5},
            {"cohort": RoundRobin()},
        ),
        (
            {"cohort": {"class_path": "Weighted"}, "clients_per_round": 5, "weighting": "uniform"},
            {"cohort": Weighted()},
        ),
        (
            {
                "cohort": {"class_path": "Weighted", "init_args": {"weights": {0: 1.5, "b": 2}}},
                "clients_per_round": 0.5,
            },
            {"cohort": Weighted({0: 1.5, "b": 2.0})},
        ),
        (
            {"local_epochs": {"class_path": "Between", "init_args": {"low": 1, "high": 5}}},
            {"local_epochs": Between(1, 5)},
        ),
        ({"local_epochs": 3}, {"local_epochs": 3}),
        (
            {"local_steps": {"class_path": "PerClient", "init_args": {"amounts": {0: 5, "b": 7}, "default": 2}}},
            {"local_steps": PerClient({0: 5, "b": 7}, 2)},
        ),
        ({"stragglers": {"share": 0.9, "policy": "drop"}}, {"stragglers": Stragglers(0.9, "drop")}),
        (
            {"stragglers": {"class_path": "lightning_fl.clients.Stragglers", "init_args": {"share": 0.9}}},
            {"stragglers": Stragglers(0.9)},
        ),
    ],
)
def test_yaml(given: dict[str, Any], expected: dict[str, Any]) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(FederatedStrategy, "strategy")
    config = parser.parse_object({"strategy": given})
    again = parser.parse_string(parser.dump(config))
    for parsed in (config, again):
        strategy = parser.instantiate_classes(parsed).strategy
        for name, value in expected.items():
            assert getattr(strategy, name) == value


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cohort": Poisson(0.1), "clients_per_round": 5}, "clients_per_round=5 would be ignored"),
        ({"cohort": Weighted()}, "needs clients_per_round"),
        ({"cohort": RoundRobin()}, "needs clients_per_round"),
        ({"cohort": Uniform(secure=True)}, "has no effect if all clients take part"),
        ({"cohort": "poisson"}, r"is a str; expected a cohort such as fl.clients.Poisson"),
        ({"stragglers": 0.9}, r"is a float; expected fl.clients.Stragglers"),
        ({"local_epochs": Between(1, 2), "local_steps": 3}, "contradict each other"),
        ({"local_epochs": 1.5}, "must be a whole number"),
    ],
)
def test_what_cannot_be_right_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FederatedStrategy(**options)


def test_examples_that_count_twice_cause_a_warning() -> None:
    with pytest.warns(UserWarning, match="by its square"):
        FederatedStrategy(cohort=Weighted(), clients_per_round=2)
    FederatedStrategy(cohort=Weighted({0: 1.0}), clients_per_round=1)
    FederatedStrategy(cohort=Weighted(), clients_per_round=2, weighting="uniform")


def test_what_does_not_fit_the_clients_is_refused_before_training() -> None:
    for options in ({"cohort": Weighted({0: 1.0}), "clients_per_round": 1}, {"local_steps": PerClient({0: 1})}):
        with pytest.raises(ValueError, match="client 1"):
            minimise(FederatedStrategy(**options), 1)
