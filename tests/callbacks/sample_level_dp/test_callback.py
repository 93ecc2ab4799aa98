"""Sample-level privacy through the real Trainer: DP-SGD, one ledger a client, checks that stop the run."""

from __future__ import annotations

import csv
import itertools
import math
import os
from pathlib import Path
from typing import Any

import dp_accounting
import pytest
import torch
from dp_accounting.pld import PLDAccountant
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader

import lightning_fl as fl
from lightning_fl import FederatedStrategy
from lightning_fl.algorithms import FedAvg, FedProx
from lightning_fl.callbacks import SampleLevelDP
from lightning_fl.privacy import Gaussian, InsecureNoiseWarning, Ledger, Poisson, PrivacyBudgetExceeded
from tests.helpers.privacy import SIZES, fit, private
from tests.helpers.training import Plain, image_clients, images, trainer, weights

# ---- what a client does


def test_without_noise_it_is_a_loop_that_clips_each_example() -> None:
    clip, rounds, module = 0.05, 3, Plain()
    params, data = dict(module.named_parameters()), images(12)
    for _ in range(rounds):
        total = [torch.zeros_like(param) for param in params.values()]
        for x, y in data:
            loss = functional.cross_entropy(module.net(x[None].double()), y[None])
            grads = torch.autograd.grad(loss, list(params.values()))
            norm = math.sqrt(sum(float(grad.square().sum()) for grad in grads))
            total = [old + grad * min(1.0, clip / norm) for old, grad in zip(total, grads, strict=True)]
        with torch.no_grad():
            for param, grad in zip(params.values(), total, strict=True):
                param -= 0.1 * grad / len(data)
    expected = weights(module)
    for options in ({}, {"max_physical_batch_size": 5}, {"grad_sample_mode": "functorch"}):
        callback = private(noise_multiplier=0.0, max_grad_norm=clip, **options)
        with pytest.warns(UserWarning, match="only clips: this run is NOT PRIVATE"):
            _, found = fit(callback, rounds, data=image_clients((12,), 99))
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


class Still(Plain):
    """Learns nothing: the model moves by the noise alone."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * 0.0


def test_the_noise_has_the_recorded_deviation() -> None:
    rounds, clip, sigma = 6, 0.5, 3.0
    start = weights(Plain())
    _, found = fit(private(noise_multiplier=sigma, max_grad_norm=clip), rounds, Still(), image_clients((40,), 10))
    moved, steps = found - start, rounds * 4
    assert float(moved.std()) == pytest.approx(0.1 * sigma * clip / 10 * steps**0.5, rel=5 / (2 * len(moved)) ** 0.5)


def test_a_batch_of_nobody_is_a_step_of_noise() -> None:
    class Watch(fl.callbacks.FederatedCallback):
        def __init__(self) -> None:
            self.sizes: list[int] = []

        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            self.sizes.append(len(batch[0]))
            self.before = weights(module)

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if len(batch[0]) == 0 and not trainer.is_last_batch:
                assert (weights(module) != self.before).all()

    class Strict(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            assert len(batch[0])
            self.log("loss", (loss := super().training_step(batch, batch_idx)), on_step=True, on_epoch=True)
            return loss

    watch = Watch()
    run, found = fit(private(), 2, Strict(), image_clients((30,), 1), callbacks=[watch])
    assert len(watch.sizes) == 60
    assert 0 in watch.sizes
    assert found.isfinite().all()
    assert math.isfinite(run.callback_metrics["loss_epoch"])


def test_large_batches_go_in_parts_and_log_the_same() -> None:
    class Logs(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.sizes: list[int] = []

        def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
            self.sizes.append(len(batch[0]))
            loss = super().training_step(batch, batch_idx)
            self.log("loss", loss, on_step=False, on_epoch=True)
            return {"loss": loss}

    logged, kept = [], []
    for most in (None, 7):
        module = Logs()
        with pytest.warns(InsecureNoiseWarning):
            callback = private(max_physical_batch_size=most, insecure_test_seed=1)
        run, found = fit(callback, 2, module, image_clients((60,), 30), local_epochs=2)
        logged.append(float(run.callback_metrics["loss"]))
        kept.append(found)
        assert (max(module.sizes) <= 7) == (most == 7)
    assert logged[0] == pytest.approx(logged[1], rel=1e-12)
    torch.testing.assert_close(kept[0], kept[1], rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("ignore::lightning_fl.privacy.InsecureNoiseWarning")
def test_the_algorithm_sees_the_private_gradient_and_is_not_clipped() -> None:
    clip, lr, seen = 0.5, 0.05, []

    class Prox(FedProx):
        def grad_transform(self, grads: Any, params: Any, ctx: Any) -> Any:
            changed = super().grad_transform(grads, params, ctx)
            seen.append([flat(tree).clone() for tree in (params, grads, changed)])
            return changed

    def flat(tree: Any) -> Tensor:
        return torch.cat([value.detach().flatten() for value in tree.values()])

    moved = {}
    for name, algorithm in {"fedavg": FedAvg(), "fedprox": Prox(mu=10.0)}.items():
        callback = private(noise_multiplier=0.5, max_grad_norm=clip, insecure_test_seed=3)
        _, found = fit(callback, 1, Plain(lr=lr), image_clients((40,), 8), algorithm=algorithm, local_epochs=6)
        moved[name] = float((found - weights(Plain())).norm())
    assert moved["fedprox"] < 0.7 * moved["fedavg"]
    for (params, grads, changed), (following, *_) in itertools.pairwise(seen):
        torch.testing.assert_close(following, params - lr * changed, rtol=0, atol=1e-12)  # not clipped nor noised again
        torch.testing.assert_close(changed, grads + 10.0 * (params - seen[0][0]), rtol=0, atol=1e-12)
        assert (grads != 0).all()  # noise on what the batch does not reach, too


@pytest.mark.filterwarnings("ignore::lightning_fl.privacy.InsecureNoiseWarning")
@pytest.mark.parametrize("algorithm", ["scaffold", "fedadam", "fednova", "fedrep", "ditto"])
@pytest.mark.spread(2)
def test_other_algorithms_train_under_it(algorithm: str) -> None:
    options = {"personal": ("net.3.*",)} if algorithm == "fedrep" else {}
    run, found = fit(private(insecure_test_seed=0), 2, algorithm=algorithm, **options)
    assert found.isfinite().all()
    assert (found != weights(Plain())).any()
    ledgers = run.callbacks[1].ledgers(run)  # type: ignore[attr-defined]
    per_round = {"fedrep": 11, "ditto": 2}.get(algorithm, 1)
    assert {client: sum(count for _, count in own) for client, own in ledgers.items()} == {
        client: 2 * per_round * -(-size // 8) for client, size in enumerate(SIZES)
    }


def test_weights_are_the_numbers_of_examples_not_of_those_drawn() -> None:
    seen: dict[Any, list[float]] = {}

    class Watch(fl.callbacks.FederatedCallback):
        def on_client_end(self, trainer: Any, module: Any, client: Any, run: Any, update: Any) -> None:
            seen.setdefault(client, []).append(run.weight)

    fit(private(), 3, callbacks=[Watch()])
    assert seen == {client: [float(size)] * 3 for client, size in enumerate(SIZES)}


# ---- what it amounts to


def directly(sigma: float, rate: float, steps: int, delta: float) -> float:
    event = dp_accounting.GaussianDpEvent(sigma)
    event = dp_accounting.PoissonSampledDpEvent(rate, event) if rate < 1 else event
    accountant = PLDAccountant()
    accountant.compose(event, steps)
    return accountant.get_epsilon(delta)


def test_each_client_has_the_epsilon_of_its_own_steps_and_the_largest_is_logged(tmp_path: Path) -> None:
    callback = private(noise_multiplier=2.0, max_grad_norm=0.7, delta=1e-6)
    logger = CSVLogger(tmp_path)
    run, _ = fit(callback, 3, logger=logger, local_epochs=2)
    expected = {
        client: directly(2.0, min(1.0, 8 / size), 3 * 2 * -(-size // 8), 1e-6) for client, size in enumerate(SIZES)
    }
    found = callback.epsilons(run)
    assert found == {client: pytest.approx(value, abs=2e-4) for client, value in expected.items()}
    rows = list(csv.DictReader((Path(logger.log_dir) / "metrics.csv").read_text().splitlines()))
    logged = [float(row["fl/dp_epsilon"]) for row in rows if row.get("fl/dp_epsilon")]
    assert logged == sorted(logged)
    assert len(logged) == 3
    assert max(expected.values()) - 2e-4 <= logged[-1] <= max(expected.values()) + 5e-3
    entry = run.strategy.history[-1]  # type: ignore[attr-defined]
    facts = {
        "delta": 1e-6,
        "noise_multiplier": 2.0,
        "clip": 0.7,
        "mode": "sample",
        "unit": "example",
        "is_private": 1.0,
    }
    assert {name: entry[f"dp_{name}"] for name in facts} == facts
    assert "whoever sees what a client sends" in entry["dp_adversary"]
    assert "dp_unit: example" in (Path(logger.log_dir) / "hparams.yaml").read_text()


def test_a_client_pays_for_the_rounds_in_which_it_takes_part() -> None:
    seen: list[Any] = []

    class Watch(fl.callbacks.FederatedCallback):
        def on_round_start(self, trainer: Any, module: Any, round: int, cohort: Any) -> None:
            seen.extend(cohort)

    callback = private()
    run, _ = fit(callback, 5, data=image_clients((16,) * 4, 8), clients_per_round=2, callbacks=[Watch()])
    steps = {client: sum(count for _, count in own) for client, own in callback.ledgers(run).items()}
    assert steps == {client: 2 * seen.count(client) for client in set(seen)}


@pytest.mark.filterwarnings("ignore::lightning_fl.privacy.InsecureNoiseWarning")
@pytest.mark.parametrize("algorithm", ["fedavg", "scaffold"])
@pytest.mark.spread(1)
def test_resuming_is_not_stopping(tmp_path: Path, algorithm: str) -> None:
    def run(callback: SampleLevelDP, rounds: int, **options: Any) -> tuple[Tensor, dict[Any, Ledger]]:
        done, found = fit(callback, rounds, algorithm=algorithm, **options)
        done.save_checkpoint(tmp_path / f"{rounds}.ckpt")
        return found, callback.ledgers(done)

    options = {"insecure_test_seed": 5}
    whole, expected = run(private(**options), 4)
    run(private(**options), 2)
    last: dict[str, Any] = {"ckpt_path": str(tmp_path / "2.ckpt"), "weights_only": True}
    found, ledgers = run(private(**options), 4, **last)
    assert torch.equal(found, whole)
    assert ledgers == expected
    _, changed = run(private(noise_multiplier=2.0, **options), 4, **last)
    without_seed = private()
    run(without_seed, 3, **last)
    assert without_seed.state_dict()["was_without"]
    both = Ledger()
    for sigma in (1.0, 2.0):
        both.record(Gaussian(sigma, Poisson(8 / 50)), 14)
    assert changed[2] == both


def test_a_round_that_fails_is_paid_for() -> None:
    class Fails(fl.callbacks.FederatedCallback):
        def on_aggregate_end(self, trainer: Any, module: Any, aggregate: Any) -> None:
            self.done = True

        def on_client_end(self, trainer: Any, module: Any, client: Any, run: Any, update: Any) -> None:
            if trainer.current_epoch == 1 and client == 1:
                raise RuntimeError("lost")

    callback, strategy = private(), FederatedStrategy()
    run = trainer(strategy, 2, callbacks=[callback, Fails()])
    with pytest.raises(RuntimeError, match="lost"):
        run.fit(Plain(), image_clients(SIZES, 8))
    steps = {client: sum(count for _, count in own) for client, own in callback.ledgers(run).items()}
    assert steps == {0: 2, 1: 6, 2: 7}


def test_a_client_whose_update_is_refused_is_paid_for() -> None:
    class Breaks(fl.callbacks.FederatedCallback):
        def on_client_start(self, trainer: Any, module: Any, client: Any) -> None:
            if client == 0:
                for group in trainer.optimizers[0].param_groups:
                    group["lr"] = math.nan

    callback = private()
    with pytest.warns(UserWarning, match="hold NaN or Inf"):
        run, found = fit(callback, 1, callbacks=[Breaks()])
    assert found.isfinite().all()
    assert {client: sum(count for _, count in own) for client, own in callback.ledgers(run).items()} == {
        0: 1,
        1: 3,
        2: 7,
    }


def test_rounds_without_it_make_epsilon_infinite() -> None:
    module, clients, strategy = Plain(), image_clients(SIZES, 8), FederatedStrategy(client_optimizer="keep")
    first = trainer(strategy, 1)
    first.fit(module, clients)
    first.fit_loop.max_epochs = 2
    first.callbacks.append(private())  # type: ignore[attr-defined]
    first.fit(module, clients)
    entry = strategy.history[-1]
    assert (entry["dp_epsilon"], entry["dp_is_private"], entry["dp_guarantee"]) == (math.inf, 0.0, "NOT PRIVATE")


@pytest.mark.slow
def test_target_epsilon_takes_the_least_noise_that_is_enough() -> None:
    callback = private(target_epsilon=4.0, method="rdp")
    run, _ = fit(callback, 3, data=image_clients((20, 50), 8))
    sigma = run.strategy.history[-1]["dp_noise_multiplier"]  # type: ignore[attr-defined]
    assert 3.97 < max(callback.epsilons(run).values()) <= 4.0

    def largest(sigma: float) -> float:
        spent = []
        for size, steps in ((20, 9), (50, 21)):
            ledger = Ledger()
            ledger.record(Gaussian(sigma, Poisson(8 / size)), steps)
            spent.append(float(ledger.epsilon(1e-5, "rdp")))
        return max(spent)

    assert largest(sigma) <= 4.0 < largest(sigma - 5e-3)
    assert len(run.strategy.history) == 3  # type: ignore[attr-defined]


def test_training_stops_before_a_round_that_would_exceed_the_budget() -> None:
    callback = private(max_epsilon=8.0, method="rdp")
    run, _ = fit(callback, 50, data=image_clients((40,), 8))
    num_rounds = len(run.strategy.history)  # type: ignore[attr-defined]
    assert 1 <= num_rounds < 50
    ledger = callback.ledger(run, 0)
    assert ledger.epsilon(1e-5, "rdp") <= 8.0
    ledger.record(Gaussian(1.0, Poisson(8 / 40)), 5)
    assert ledger.epsilon(1e-5, "rdp") > 8.0
    with pytest.raises(PrivacyBudgetExceeded, match="Round 0 would raise"):
        fit(private(max_epsilon=0.1, method="rdp"), 1)


# ---- ranks


def on_ranks() -> tuple[Tensor, dict[Any, list[Any]], float]:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InsecureNoiseWarning)
        callback = private(insecure_test_seed=2, method="rdp")
    run, found = fit(callback, 2, data=image_clients((10, 20, 30, 40), 8))
    ledgers = {client: own.state_dict()["events"] for client, own in callback.ledgers(run).items()}
    return found, ledgers, run.strategy.history[-1]["dp_epsilon"]  # type: ignore[attr-defined]


def test_two_ranks_train_and_report_what_one_does(run_ranks: Any) -> None:
    ((whole, ledgers, epsilon),) = run_ranks(1, on_ranks)
    ranks = run_ranks(2, on_ranks)
    assert all(own == pytest.approx(epsilon) for *_, own in ranks)
    assert {client: events for _, own, _ in ranks for client, events in own.items()} == ledgers
    for found, *_ in ranks:
        torch.testing.assert_close(found, whole, rtol=1e-9, atol=1e-12)


def as_silos() -> tuple[dict[Any, list[Any]], float]:
    callback = private(method="rdp")
    rank = int(os.environ.get("RANK", "0"))
    run = trainer(FederatedStrategy(), 2, callbacks=[callback])
    run.fit(Plain(), DataLoader(images(10 + 10 * rank, rank), 8))
    ledgers = {client: own.state_dict()["events"] for client, own in callback.ledgers(run).items()}
    return ledgers, run.strategy.history[-1]["dp_epsilon"]  # type: ignore[attr-defined]


def test_silos_each_have_a_ledger_and_hear_of_the_largest_epsilon(run_ranks: Any) -> None:
    (first, largest), (second, also) = run_ranks(2, as_silos)
    assert largest == also
    assert [list(first), list(second)] == [[0], [1]]
    ledgers = [Ledger(), Ledger()]
    for ledger, (size, steps) in zip(ledgers, ((10, 4), (20, 6)), strict=True):
        ledger.record(Gaussian(1.0, Poisson(8 / size)), steps)
    assert [first[0], second[1]] == [ledger.state_dict()["events"] for ledger in ledgers]
    assert largest == pytest.approx(max(ledger.epsilon(1e-5, "rdp") for ledger in ledgers), abs=1e-6)


def test_beside_a_secure_sum() -> None:
    callback = private(method="rdp")
    aggregator = fl.privacy.SecureAggregation(protocol="bonawitz")
    run = trainer(FederatedStrategy(aggregator=aggregator), 2, callbacks=[callback])
    module = Plain(torch.float32)
    run.fit(module, image_clients((10, 20, 30), 8))
    assert weights(module).isfinite().all()
    assert sum(count for own in callback.ledgers(run).values() for _, count in own) == 2 * (2 + 3 + 4)


class Convolutions(Plain):
    """Layers of many kinds, with dropout, trained by Adam and validated."""

    def __init__(self) -> None:
        super().__init__(torch.float32, lambda params: torch.optim.Adam(params, 0.01))
        layers = [nn.Conv2d(1, 6, 2), nn.GroupNorm(2, 6), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(54, 4)]
        self.net = nn.Sequential(*layers)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        hidden = functional.dropout(self.net[:4](batch[0]), 0.2, self.training)
        loss = functional.cross_entropy(self.net[4:](hidden), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", functional.cross_entropy(self.net(batch[0]), batch[1]))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.spread(1)
def test_what_users_write(precision: Any) -> None:
    run, found = fit(
        private(noise_multiplier=0.5, max_physical_batch_size=6, method="rdp"),
        3,
        Convolutions(),
        image_clients((40, 60), 12, validate=True),
        precision=precision,
    )
    assert found.isfinite().all()
    assert run.callback_metrics["val_loss"] > 0
