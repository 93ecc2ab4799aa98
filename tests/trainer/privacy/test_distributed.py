"""Distributed noise through the real Trainer: its deviation for every dropout, and accuracy beside central noise."""

from __future__ import annotations

import itertools
import math
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning as L
import pytest
import torch
from torch import Tensor, nn

import lightning_fl as fl
from lightning_fl.aggregation import Transform, WeightedMean
from lightning_fl.datamodules import IID, DigitsDataModule, PartitionedDataModule
from lightning_fl.privacy import AdaptiveClip, ClientLevelDP, SecureAggregation, load_ledger, noise_multiplier_for
from lightning_fl.privacy.accounting.sampling import Distributed
from lightning_fl.privacy.secagg import SecureAggregationError
from lightning_fl.privacy.secagg import aggregator as secure
from lightning_fl.privacy.secagg.dropouts import STAGES
from lightning_fl.privacy.secagg.keys import KeyFolder
from tests.helpers.training import Plain, image_clients, loader, trainer, weights
from tests.trainer.ranks.test_hooks_and_callbacks import rank

NOISES = ("discrete_gaussian", "skellam")


def private(**options: Any) -> ClientLevelDP:
    given = {"clip": 0.5, "noise_multiplier": 1.0, "mode": "distributed", "delta": 1e-5}
    return ClientLevelDP(**{**given, **options})


class Still(L.LightningModule):
    """Learns nothing, so that all that reaches the global model is noise."""

    def __init__(self, size: int = 20_000) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.zeros(size))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.values.sum() * 0.0

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1.0)


def fit(module: Any, protocol: Any = "pairwise", min_clients: int = 3, clients: int = 5, **options: Any) -> Any:
    strategy = fl.FederatedStrategy(
        "fedavg",
        aggregator=SecureAggregation(protocol=protocol, min_clients=min_clients),
        transforms=[private(**options)],
    )
    trainer(strategy).fit(module, image_clients((4,) * clients))
    return strategy


def check_noise(found: Tensor, num_honest: int, num_survivors: int) -> None:
    expected = 0.5 * math.sqrt(num_survivors / num_honest) / num_survivors  # of the mean
    assert abs(found.std() / expected - 1) < 4 / math.sqrt(2 * found.numel())
    assert abs(found.mean()) < 4 * expected / math.sqrt(found.numel())


@pytest.mark.parametrize("noise", ["discrete_gaussian", pytest.param("skellam", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_the_survivors_noise_for_every_dropout_pattern(noise: Any) -> None:
    """Five clients, of which four must stay: the noise of three is secret, and enough."""
    sums = 0
    several = [gone for number in (2, 3, 4, 5) for gone in itertools.combinations(range(5), number)]
    patterns = [dict(zip(gone, itertools.cycle(STAGES), strict=False)) for gone in several]
    patterns += [{}, *({client: stage} for client in range(5) for stage in STAGES[:3])]
    for stages in patterns:
        gone, module = [client for client, stage in stages.items() if stage in STAGES[:3]], Still()
        with patch.object(secure, "plan_dropouts", lambda share, seed, ctx, stages=stages: stages):
            if len(stages) > 1:
                with pytest.raises(SecureAggregationError):
                    fit(module, "bonawitz", 4, noise=noise)
                assert not bool(module.values.any()), "nothing was released"
                continue
            fit(module, "bonawitz", 4, noise=noise)
        check_noise(module.values.detach(), 3, 5 - len(gone))
        sums += 1
    assert sums == 16


def test_a_client_that_vanishes_after_it_has_sent_still_counts() -> None:
    for stage in ("agree", "unmask"):
        module = Still()
        with patch.object(secure, "plan_dropouts", lambda share, seed, ctx, stage=stage: {1: stage}):
            fit(module, "bonawitz", 4)
        check_noise(module.values.detach(), 3, 5)


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("num_colluding", [0, 2])
def test_pairwise_masks_and_colluding_clients(noise: Any, num_colluding: int) -> None:
    module = Still()
    strategy = fit(module, min_clients=5, noise=noise, num_colluding=num_colluding)
    check_noise(module.values.detach(), 5 - num_colluding, 5)
    ((event, count),) = load_ledger(strategy.driver.state.transforms[0])
    assert isinstance(event.sampling, Distributed)
    assert (event.sampling.noise, count) == (noise, 1)
    assert load_ledger(strategy.driver.state.transforms[0]).epsilon(1e-5).method == (
        "rdp" if noise == "skellam" else "pld"
    )
    assert event.noise_multiplier == pytest.approx(1.0, abs=1e-3)
    assert strategy.history[0]["update_spread"] == 0.0, "no norm of a client's own is summed"


def test_the_mean_of_clipped_updates_is_what_is_noised() -> None:
    exact, noised = Plain(torch.float32), Plain(torch.float32)
    central = ClientLevelDP(clip=0.05, noise_multiplier=0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer(fl.FederatedStrategy("fedavg", transforms=[central])).fit(exact, image_clients((4,) * 5))
        strategy = fit(noised, min_clients=5, clip=0.05, noise_multiplier=0.0)
    assert (weights(exact) - weights(noised)).abs().max() < 2 * 0.05 / 1024
    assert strategy.history[0]["dp_epsilon"] == math.inf
    assert all(param.dtype == torch.float32 for param in noised.parameters())
    assert all(value.dtype == torch.float32 for value in strategy.driver.state.server["params"].values())


@pytest.mark.parametrize("algorithm", ["scaffold", "fedadam"])
def test_side_channels_and_server_optimizers_take_the_noised_sum(algorithm: str) -> None:
    module = Plain()
    strategy = fl.FederatedStrategy(algorithm, aggregator=SecureAggregation(min_clients=5), transforms=[private()])
    before = weights(module)
    trainer(strategy, 2).fit(module, image_clients((4,) * 5))
    assert bool(weights(module).isfinite().all())
    assert not torch.equal(weights(module), before)


def test_an_update_with_nan_counts_as_zeros_with_noise() -> None:
    calls = itertools.count(1)

    class Breaks(Still):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.values.sum() * (float("nan") if next(calls) == 2 else 0.0)

    module = Breaks()
    with pytest.warns(UserWarning, match="hold NaN"):
        fit(module, min_clients=5)
    check_noise(module.values.detach(), 4, 5)


def test_resuming_keeps_the_ledger() -> None:
    def strategy() -> fl.FederatedStrategy:
        return fl.FederatedStrategy("fedavg", aggregator=SecureAggregation(min_clients=5), transforms=[private()])

    data = image_clients((4,) * 5)
    run = trainer(strategy(), 2)
    run.fit(Plain(), data)
    run.save_checkpoint("two.ckpt")
    more = trainer(strategy(), 3)
    more.fit(Plain(), data, ckpt_path="two.ckpt")
    ((_, count),) = load_ledger(more.strategy.driver.state.transforms[0])  # type: ignore[attr-defined]
    assert count == 3


def test_a_budget_stops_training() -> None:
    strategy = fl.FederatedStrategy(
        "fedavg", aggregator=SecureAggregation(min_clients=5), transforms=[private(max_epsilon=8.0)]
    )
    trainer(strategy, 50).fit(Plain(), image_clients((4,) * 5))
    assert len(strategy.history) == 2
    assert strategy.history[-1]["dp_epsilon"] <= 8.0


class Shifts(Transform):
    keeps_norm_bound = True


@pytest.mark.parametrize(
    ("options", "of_strategy", "message"),
    [
        ({}, {"aggregator": WeightedMean()}, "aggregator=fl.privacy.SecureAggregation"),
        ({}, {"transforms": [Shifts()]}, "Put ClientLevelDP last"),
        ({"clip": AdaptiveClip()}, {}, "fixed clip norm"),
        ({"noise": "laplace"}, {}, "'discrete_gaussian' or 'skellam'"),
        ({"num_colluding": -1}, {}, "at least 0"),
        ({"mode": "local", "noise": "skellam"}, {}, "no effect in mode='local'"),
        ({"mode": "everywhere"}, {}, "'central', 'local' or 'distributed'"),
    ],
)
def test_what_breaks_the_guarantee_is_refused(options: Any, of_strategy: Any, message: str) -> None:
    given = {"aggregator": SecureAggregation(), **of_strategy}
    with pytest.raises(ValueError, match=message):
        fl.FederatedStrategy("fedavg", **{**given, "transforms": [private(**options), *given.pop("transforms", [])]})


def test_nobody_left_whose_noise_is_secret_is_refused() -> None:
    with pytest.raises(ValueError, match="none of them has secret noise"):
        fit(Still(), min_clients=3, num_colluding=3)


def silos(keys: str) -> tuple[Tensor, float, float]:
    module = Still(5000)
    strategy = fl.FederatedStrategy(
        "fedavg", aggregator=SecureAggregation(keys=keys, min_clients=4), transforms=[private()]
    )
    trainer(strategy).fit(module, loader(8, seed=rank()))
    return module.values.detach(), strategy.history[0]["dp_epsilon"], strategy.history[0]["num_clients"]


def test_silos_without_a_server(run_ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    folders = [KeyFolder(tmp_path / f"silo{number}") for number in range(4)]
    public = [folder.create() for folder in folders]
    for folder in folders:
        folder.trust(public)
    results = run_ranks(4, silos, str(tmp_path / "silo{rank}"))
    for values, epsilon, num_clients in results:
        assert torch.equal(values, results[0][0])
        check_noise(values, 3, 4)
        assert epsilon == pytest.approx(4.3772, abs=1e-3)
        assert num_clients == 4


class Digits(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        nn.init.zeros_(self.net[1].weight)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("accuracy", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.5)


def accuracies(mode: Any, noise_multiplier: float, aggregator: Any, num_runs: int, num_rounds: int = 15) -> list[float]:
    """The accuracy of runs that differ in nothing but the noise."""
    found = []
    for seed in range(num_runs):
        transform = ClientLevelDP(0.7, noise_multiplier, mode=mode, delta=1e-5, insecure_test_seed=seed)
        strategy = fl.FederatedStrategy("fedavg", local_epochs=2, transforms=[transform], aggregator=aggregator)
        run = trainer(strategy, num_rounds)
        run.fit(Digits(), datamodule=PartitionedDataModule(DigitsDataModule(batch_size=16), IID(), num_clients=100))
        assert strategy.history[-1]["dp_epsilon"] <= EPSILON * 1.001
        found.append(float(run.callback_metrics["accuracy"]))
    return found


EPSILON = 6.0


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.filterwarnings("ignore:insecure_test_seed")
def test_the_accuracy_of_central_noise_at_equal_epsilon_on_digits() -> None:
    """The means of so many runs that chance alone, .008 from run to run, moves them by .003."""
    noise = noise_multiplier_for(EPSILON, 1e-5, 15)
    central = statistics.mean(accuracies("central", noise, None, 30))
    distributed = statistics.mean(accuracies("distributed", noise * 1.0001, SecureAggregation(min_clients=100), 6))
    assert central > 0.8
    assert distributed > central - 0.01, (central, distributed)
