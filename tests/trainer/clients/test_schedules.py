"""Rounds on a simulated clock through the real Trainer: closed forms, ranks, resuming, and what is refused."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

import lightning_fl as fl
from lightning_fl.schedules import Buffered, Compass, Deadline, Fastest, FedAsync, Polynomial, Synchronous
from tests.helpers.training import (
    Ordinary,
    Plain,
    Quadratic,
    image_clients,
    measured,
    minimise,
    quadratic_clients,
    trainer,
    weights,
)

Q3 = {0: 1.5, 1: 2.25, 2: 4.0}
SIMPLE = {0: 1.0, 1: 2.0, 2: 4.0}
FIVE_STEPS = {0: 5.0, 1: 10.0, 2: 20.0}

pytestmark = [
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
]


class Trace(L.Callback):
    """The global model after each round."""

    def __init__(self) -> None:
        self.x: list[float] = []

    def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
        self.x.append(module.x.item())


def strategy(schedule: Any, durations: Any, algorithm: str = "fedavg", **options: Any) -> fl.FederatedStrategy:
    defaults = {"local_steps": 5, "weighting": "uniform", "engine": "sequential", "seed": 0}
    return fl.FederatedStrategy(algorithm, schedule=schedule, durations=durations, **{**defaults, **options})


def trace(schedule: Any, durations: Any, rounds: int, **options: Any) -> tuple[list[float], list[dict[str, Any]]]:
    seen, own = Trace(), strategy(schedule, durations, **options)
    minimise(own, rounds, callbacks=[seen])
    return seen.x, own.history


ANSWERS: dict[str, tuple[Any, Any, list[float]]] = {
    "fedbuff": (
        Buffered(2, staleness=Polynomial(0.5)),
        Q3,
        [4.92701, 2.9992904108, 1.3524856593, 0.9570658789, 0.8265982272],
    ),
    "fedasync": (
        FedAsync(0.6),
        Q3,
        [7.54294, 5.386648, 4.8270775844, 7.1164424087, 4.5567815892, 3.2851627257, 2.4779785330, 2.0404726864],
    ),
    "a fast client several times": (Buffered(7), SIMPLE, [5.7372179464, 3.4285555122, 2.1782166095]),
}


@pytest.mark.parametrize("engine", ["sequential", "auto"])
@pytest.mark.parametrize("name", ANSWERS)
def test_known_answers(name: str, engine: str) -> None:
    schedule, durations, expected = ANSWERS[name]
    assert trace(schedule, durations, len(expected), engine=engine)[0] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_give_the_same(run_ranks: Any, world_size: int) -> None:
    for schedule, durations, expected in ANSWERS.values():
        outcomes = run_ranks(world_size, trace, schedule, durations, len(expected))
        for found, _ in outcomes:
            assert found == pytest.approx(expected, abs=1e-9)
        assert outcomes[0][0] == outcomes[1][0]


LIMITS: dict[str, tuple[Any, Any, str, float]] = {
    "a fast client weighs more": (Buffered(7), SIMPLE, "fedavg", 0.7010243096),
    "partial work": (Deadline(10, "partial"), FIVE_STEPS, "fedavg", 0.9007826478),
    "partial work, normalised": (Deadline(10, "partial"), FIVE_STEPS, "fednova", 1.2427163958),
    "late clients dropped": (Deadline(10), FIVE_STEPS, "fedavg", 0.6214654798),
    "the fastest two": (Fastest(2, of=3), FIVE_STEPS, "fedavg", 0.6214654798),
    "synchronous": (Synchronous(), Q3, "fedavg", 1.2057623030),
}


QUICK = ("partial work", "late clients dropped")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in LIMITS]
)
@pytest.mark.spread(1)
def test_where_training_ends(name: str) -> None:
    schedule, durations, algorithm, limit = LIMITS[name]
    assert minimise(strategy(schedule, durations, algorithm), 52) == pytest.approx(limit, abs=1e-8)


def test_compass_moves_by_the_share_of_a_group() -> None:
    """Clients 0 and 1 return at 5 s with 5 and 2 steps; client 2, too slow, at 10 s with 2, with the others' next."""
    found, history = trace(Compass(2, 5), {0: 5, 1: 10, 2: 25}, 2)
    x0 = 10.0

    def change(x: float, client: int, steps: int) -> float:
        e, h = ((0, 1), (1, 2), (4, 0.5))[client]
        return (e - x) * (1 - (1 - 0.1 * h) ** steps)

    x1 = x0 + (change(x0, 0, 5) + change(x0, 1, 2)) / 3
    x2 = x1 + (change(x1, 0, 5) + change(x1, 1, 2) + change(x0, 2, 2)) / 3
    assert found == pytest.approx([x1, x2], abs=1e-9)
    assert [(entry["clock"], entry["staleness"]) for entry in history] == [(5.0, [2]), (10.0, [2, 1])]


def test_a_round_in_which_all_are_late_changes_nothing() -> None:
    found, history = trace(Deadline(1), Q3, 2)
    assert found == [10.0, 10.0]
    assert [entry["clock"] for entry in history] == [1.0, 2.0]


def test_the_history_tells_time_and_staleness() -> None:
    _, history = trace(Buffered(2), Q3, 5)
    assert [entry["clock"] for entry in history] == [2.25, 4.0, 4.5, 6.75, 8.0]
    assert [entry["staleness"] for entry in history] == [[2], [0, 2], [0, 2], [2], [0, 1, 1]]
    _, history = trace(Deadline(10), FIVE_STEPS, 1)
    assert (history[0]["dropped"], history[0]["clock"]) == ([2], 10.0)


@dataclass(frozen=True)
class Staggered(fl.clients.Durations):
    """Four equally fast clients, a quarter of a second apart: each update is 3 server updates old."""

    def seconds(self, client: Any, number: int, seed: int, measured: Any) -> float:
        return 1 + client / 4 if number < 4 else 1.0


@pytest.mark.slow
@pytest.mark.parametrize(("step", "is_stable"), [(0.36, True), (0.53, False)])
def test_stability_is_as_documented(step: float, is_stable: bool) -> None:
    """Stable below ``2 sin(pi / (2 (2 tau + 1))) = 0.445`` at tau = 3."""
    clients = quadratic_clients(e=(0.0,) * 4, h=(1.0,) * 4, sizes=(1,) * 4)
    own = strategy(Buffered(1), Staggered(), local_steps=1)
    end = abs(minimise(own, 120, clients, lr=step))
    assert own.history[-1]["staleness"] == [0, 0, 0, 1]
    assert end < 1 if is_stable else end > 30


class Sleepy(Quadratic):
    """Client 2, whose center is 4, takes its time."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        time.sleep(0.1 * (batch[0].max() == 4.0).item())
        return super().training_step(batch, batch_idx)


def measured_visits() -> list[list[Any]]:
    own = strategy(Buffered(1), fl.clients.Measured(first=1.0), local_steps=1)
    visits = Visits()
    trainer(own, 8, callbacks=[visits]).fit(Sleepy(), quadratic_clients())
    return visits.cohorts


class Visits(fl.callbacks.FederatedCallback):
    """The clients that each round takes in."""

    def __init__(self) -> None:
        self.cohorts: list[list[Any]] = []

    def on_round_start(self, trainer: Any, module: Any, round: int, cohort: Any) -> None:
        self.cohorts.append(list(cohort))


def test_a_slow_client_is_found_by_measuring(run_ranks: Any) -> None:
    """All come once after the first second; from then on as long as they took, which the ranks tell each other."""
    cohorts = measured_visits()
    assert cohorts[:3] == [[0], [1], [2]]
    assert [2] not in cohorts[3:]
    both = run_ranks(2, measured_visits)
    assert both[0] == both[1]
    assert [2] not in both[0][3:]


# ---- what always holds


def fit_images(schedule: Any, durations: Any, module: Any, rounds: int = 4, **options: Any) -> tuple[Any, Tensor]:
    path, more = options.pop("ckpt_path", None), options.pop("trainer", {})
    own = fl.FederatedStrategy(schedule=schedule, durations=durations, seed=0, **options)
    run = trainer(own, rounds, limit_val_batches=0, **more)
    run.fit(module, image_clients((5, 7, 11, 4, 9), validate=isinstance(module, Ordinary)), ckpt_path=path)
    return run, weights(module)


EQUAL = dict.fromkeys(range(5), 3.0)


@pytest.mark.parametrize("engine", ["sequential", "auto"])
@pytest.mark.parametrize("size", [pytest.param(5, marks=pytest.mark.slow), 2])
@pytest.mark.spread(2)
def test_equal_speeds_are_fedavg_bit_for_bit(engine: str, size: int) -> None:
    _, found = fit_images(Buffered(size, concurrency=size), EQUAL, Ordinary(), engine=engine)
    _, expected = fit_images(None, None, Ordinary(), engine=engine, clients_per_round=size)
    assert torch.equal(found, expected)
    _, other = fit_images(Buffered(size, concurrency=5), {**EQUAL, 0: 4.0}, Ordinary(), engine=engine)
    assert not torch.equal(other, expected)  # not because schedules had no effect


HEAVY = {0: 1.0, 1: 1.4, 2: 9.0, 3: 2.2, 4: 3.1}
STRATEGIES: dict[str, dict[str, Any]] = {
    "fedbuff": {"schedule": Buffered(2, concurrency=4, staleness=Polynomial(0.5))},
    "fedasync": {"schedule": FedAsync(0.5)},
    "repeats": {"schedule": Buffered(7)},
    "scaffold": {"schedule": Buffered(2), "algorithm": "scaffold"},
    "server momentum": {"schedule": Buffered(3), "algorithm": "fedadam"},
}


@pytest.mark.parametrize(
    "name", [*list(STRATEGIES)[:2], *(pytest.param(n, marks=pytest.mark.slow) for n in list(STRATEGIES)[2:])]
)
@pytest.mark.spread(1)
def test_resumed_after_any_round_is_the_same_bit_for_bit(name: str, tmp_path: Path) -> None:
    module = (lambda: Plain(torch.float32)) if name == "scaffold" else (lambda: Ordinary())
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    options = {"durations": HEAVY, **STRATEGIES[name]}
    more = {"callbacks": [saving], "enable_checkpointing": True}
    whole, expected = fit_images(**options, module=module(), rounds=5, trainer=more)
    assert any(len(entry["staleness"]) > 1 for entry in whole.strategy.history)
    for done in range(4):
        path = tmp_path / f"epoch={done}.ckpt"
        run, found = fit_images(**options, module=module(), rounds=5, ckpt_path=path)
        assert torch.equal(found, expected), done
        assert [e["clock"] for e in run.strategy.history] == [e["clock"] for e in whole.strategy.history]


def test_a_resumed_run_needs_the_versions_that_are_in_flight(tmp_path: Path) -> None:
    """A negative control: with its versions replaced by the present model, a resumed run ends elsewhere."""
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    more = {"callbacks": [saving], "enable_checkpointing": True}
    options = {"durations": HEAVY, **STRATEGIES["fedbuff"]}
    _, expected = fit_images(**options, module=Plain(), rounds=5, trainer=more)
    path = tmp_path / "epoch=2.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    versions = checkpoint["lightning_fl"]["versions"]
    assert versions
    for version in versions.values():
        version["server"]["params"] = {name: checkpoint["state_dict"][name] for name in version["server"]["params"]}
    torch.save(checkpoint, path)
    assert not torch.equal(fit_images(**options, module=Plain(), rounds=5, ckpt_path=path)[1], expected)


def run_of_rank(folder: Path, done: int | None) -> Tensor:
    saving = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    path = None if done is None else folder / f"epoch={done}.ckpt"
    more = {"callbacks": [saving], "enable_checkpointing": True} if done is None else {}
    options = {"durations": HEAVY, **STRATEGIES["fedbuff"]}
    with warnings.catch_warnings():  # the filters of this module are not those of the ranks
        warnings.filterwarnings("ignore", "Be aware that when using `ckpt_path`")
        return fit_images(**options, module=Plain(), rounds=5, ckpt_path=path, trainer=more)[1]


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_resume_bit_for_bit(run_ranks: Any, tmp_path: Path, world_size: int) -> None:
    whole = run_ranks(world_size, run_of_rank, tmp_path, None)
    for done in range(4):
        for found, expected in zip(run_ranks(world_size, run_of_rank, tmp_path, done), whole, strict=True):
            assert torch.equal(found, expected), done


def outcome(name: str, dtype: torch.dtype) -> tuple[Tensor, dict[str, float]]:
    run, found = fit_images(durations=HEAVY, **STRATEGIES[name], module=Ordinary(dtype), rounds=4)
    return found, measured(run)


@pytest.mark.parametrize("name", ["fedbuff", "repeats"])
@pytest.mark.spread(1)
def test_ranks_agree(run_ranks: Any, name: str) -> None:
    alone, metrics = outcome(name, torch.float64)
    for found, own in run_ranks(2, outcome, name, torch.float64):
        torch.testing.assert_close(found, alone, rtol=1e-9, atol=1e-10)
        assert own == pytest.approx(metrics, rel=1e-5)


class Steady(Ordinary):
    """With the same learning rate in each round."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def after(rounds: int, durations: dict[int, float], schedule: Any) -> dict[str, Tensor]:
    module = Steady(torch.float64)
    own = fl.FederatedStrategy(schedule=schedule, durations=durations, seed=0)
    trainer(own, rounds, limit_val_batches=0).fit(module, image_clients((5, 9), batch_size=None, validate=True))
    return dict(module.net.state_dict())


def test_buffers_are_as_old_as_the_model_they_belong_to() -> None:
    """At alpha = 1 the model of whoever comes last is taken, BatchNorm's statistics and counter and all."""
    stale = after(2, {0: 1.0, 1: 1.5}, FedAsync(1.0))
    torch.testing.assert_close(stale, after(1, {0: 9.0, 1: 1.0}, FedAsync(1.0)), rtol=1e-12, atol=1e-12)
    assert not torch.equal(stale["1.running_mean"], after(2, {0: 1.0, 1: 9.0}, FedAsync(1.0))["1.running_mean"])


@pytest.mark.parametrize("name", ["fedbuff", "fedasync", "repeats"])
@pytest.mark.spread(1)
def test_clients_side_by_side_give_what_each_alone_gives(name: str) -> None:
    options: dict[str, Any] = {"durations": HEAVY, **STRATEGIES[name]}
    _, together = fit_images(**options, module=Ordinary(torch.float64), rounds=4, engine="vectorized")
    _, alone = fit_images(**options, module=Ordinary(torch.float64), rounds=4, engine="sequential")
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-10)


class Noisy(Quadratic):
    """Notes a random number of each step."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.seen.append(float(torch.rand(())))
        return super().training_step(batch, batch_idx)


def test_two_visits_draw_other_numbers() -> None:
    module = Noisy()
    module.seen = []
    trainer(strategy(Buffered(7), SIMPLE, local_steps=1), 1).fit(module, quadratic_clients())
    assert len(set(module.seen)) == 7


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no durations": ({"schedule": Buffered(2)}, "needs durations"),
    "no schedule": ({"schedule": 3, "durations": Q3}, "is a int"),
    "no seconds": ({"durations": "fast"}, "is not known"),
    "cohorts": ({"schedule": Buffered(2), "durations": Q3, "clients_per_round": 2}, "has no cohorts"),
    "over-provisioned cohorts": ({"schedule": Fastest(1, 2), "durations": Q3, "clients_per_round": 2}, "starts 2"),
    "other cohorts": (
        {"schedule": Buffered(2), "durations": Q3, "cohort": fl.clients.Poisson(0.5)},
        "cohort=.*would be ignored",
    ),
    "stragglers": ({"durations": Q3, "stragglers": fl.clients.Stragglers(0.5)}, "says who is late"),
    "too many": (
        {"schedule": Buffered(2, concurrency=4), "durations": Q3, "num_clients": 3},
        "Lower concurrency",
    ),
    "secure sums": (
        {"schedule": Buffered(2), "durations": Q3, "aggregator": fl.privacy.SecureAggregation()},
        "sums updates that nobody sees",
    ),
    **{
        f"{name} and {type(schedule).__name__}": (
            {"algorithm": name, "schedule": schedule, "durations": Q3},
            rf"step of .* is a ratio .* {type(schedule).__name__}.*schedule with cohorts",
        )
        for name in ("qfedavg", "term", "afl", "ifca", "fedexp")
        for schedule in (Buffered(2, staleness=fl.schedules.Polynomial()), FedAsync())
    },
    "fednova and FedAsync": (
        {"algorithm": "fednova", "schedule": FedAsync(), "durations": Q3},
        "FedNova sends changes in other units",
    ),
    "feddyn and FedAsync": (
        {"algorithm": "feddyn", "schedule": FedAsync(), "durations": Q3},
        r"FedDyn is right only .* FedAsync.* scales them",
    ),
    "central privacy": (
        {
            "schedule": Deadline(3),
            "durations": Q3,
            "transforms": [fl.privacy.ClientLevelDP(clip=1.0, noise_multiplier=1.0)],
        },
        "the speed of clients decides",
    ),
    "a coordinator": (
        {"durations": Q3, "federation": "https://a:1", "kit": "kit"},
        "durations .silos arrive when they arrive. would be ignored",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_contradictions_are_refused(name: str) -> None:
    options, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        fl.FederatedStrategy(**options)


def test_ratios_go_with_cohorts_and_fednova_with_staleness_weights() -> None:
    for name in ("qfedavg", "term", "afl", "ifca", "fedexp", "feddyn"):
        fl.FederatedStrategy(name, schedule=Deadline(3), durations=Q3)
    fl.FederatedStrategy("fednova", schedule=Buffered(2, staleness=fl.schedules.Polynomial()), durations=Q3)


@pytest.mark.parametrize("options", [{"algorithm": "scaffold"}, {"aggregator": fl.aggregation.Median(1)}])
def test_a_client_with_state_comes_once_in_a_round(options: dict[str, Any]) -> None:
    with pytest.raises(MisconfigurationException, match="Round 0 takes in client 0 twice"):
        minimise(strategy(Buffered(7), SIMPLE, **options), 1)


def test_durations_of_strangers_are_refused() -> None:
    with pytest.raises(ValueError, match="does not name client 2"):
        minimise(strategy(None, {0: 1, 1: 2}), 1)
