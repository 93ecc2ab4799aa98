"""Silos on their own machines train the model of one process."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import ConcatDataset, DataLoader, TensorDataset

import lightning_fl as fl
from lightning_fl import FederatedStrategy
from lightning_fl.clients.cohorts import describe_sampling
from lightning_fl.federation.single_update import single_update
from lightning_fl.strategies.network import settings_of_silo
from tests.helpers.network import NAMES, live_coordinator, make_keys, make_kits, rules, settings, without_launcher
from tests.helpers.training import Ordinary, images, trainer, weights


class Scheduled(Ordinary):
    """The same with a schedule by rounds, since no silo knows how many steps the largest of them takes."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]


SIZES = {"east": 5, "north": 17, "south": 30}


def loader_of(name: str) -> DataLoader[Any]:
    return DataLoader(images(SIZES[name], seed=NAMES.index(name)), batch_size=4, shuffle=True)


def validation_of(*names: str) -> DataLoader[Any]:
    return DataLoader(ConcatDataset([images(SIZES[name], seed=9 + NAMES.index(name)) for name in names]), batch_size=8)


def train_silo(address: str, folder: Path, algorithm: str, dtype: torch.dtype, options: dict[str, Any]) -> Any:
    without_launcher()
    # Ranks of the test's workers; a real silo is started by hand and knows its name from its kit.
    name = Path.cwd().name.replace("rank0", "east").replace("rank1", "north").replace("rank2", "south")
    module = Scheduled(dtype)
    strategy = FederatedStrategy(algorithm, federation=address, kit=folder / name, **options)
    fit = trainer(strategy, max_epochs=3, limit_val_batches=0 if strategy.personal else 1.0)
    fit.fit(module, loader_of(name), validation_of(name))
    return outcome(module, fit)


def outcome(module: Any, fit: Any) -> Any:
    metrics = {name: value.item() for name, value in fit.callback_metrics.items()}
    learning_rates = [group["lr"] for optimizer in fit.optimizers for group in optimizer.param_groups]
    return weights(module), metrics, fit.global_step, learning_rates


def train_alone(algorithm: str, dtype: torch.dtype, options: dict[str, Any]) -> Any:
    module = Scheduled(dtype)
    clients = fl.datamodules.ClientLoaders({name: loader_of(name) for name in NAMES})
    strategy = FederatedStrategy(algorithm, engine="sequential", **options)
    fit = trainer(strategy, max_epochs=3, limit_val_batches=0 if strategy.personal else 1.0)
    fit.fit(module, clients, validation_of(*NAMES))
    return outcome(module, fit)


CASES = {
    "fedavg": ("fedavg", {}),
    "fedadam": ("fedadam", {}),
    "scaffold": ("scaffold", {}),
    "mimelite": ("mimelite", {}),
    "feddyn": ("feddyn", {}),
    "personal head, kept optimizers": ("fedavg", {"personal": ["net.4.*"], "client_optimizer": "keep"}),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.spread(1)
def test_three_silos_give_what_one_process_gives(run_ranks: Any, tmp_path: Path, case: str, dtype: torch.dtype) -> None:
    algorithm, options = CASES[case]
    alone = train_alone(algorithm, dtype, options)
    make_kits(tmp_path)
    strategy = FederatedStrategy(algorithm, **options)
    own = settings(strategy.algorithm)
    with live_coordinator(tmp_path, rules(), own, settings_of_silo(strategy)) as live:
        silos = run_ranks(3, train_silo, live.address, tmp_path, algorithm, dtype, options)
    rtol = 1e-9 if dtype == torch.float64 else 1e-6
    for model, metrics, step, learning_rates in silos:
        torch.testing.assert_close(model, alone[0], rtol=rtol, atol=rtol)
        assert metrics == pytest.approx(alone[1], rel=1e-5)
        assert (step, learning_rates) == (alone[2], pytest.approx(alone[3]))
        assert torch.equal(model, silos[0][0])


@pytest.mark.slow
def test_three_silos_under_secure_aggregation_give_what_one_process_gives(run_ranks: Any, tmp_path: Path) -> None:
    """Weights within the bound of the integers; the metrics of training and validation are sums too."""
    alone = train_alone("fedavg", torch.float64, {})
    make_kits(tmp_path)
    make_keys(tmp_path)
    options = {"aggregator": fl.privacy.SecureAggregation("bonawitz", max_weight=32.0)}
    strategy = FederatedStrategy("fedavg", **options)
    own = settings(strategy.algorithm, aggregator=strategy.aggregator)
    with live_coordinator(tmp_path, rules(), own, settings_of_silo(strategy)) as live:
        silos = run_ranks(3, train_silo, live.address, tmp_path, "fedavg", torch.float64, options)
    num_rounds, bound = 3, 3 * strategy.aggregator.ranges.quantizer("delta", 3).step * 32 / sum(SIZES.values())
    for model, metrics, step, learning_rates in silos:
        # A difference after one round grows a little in the next.
        torch.testing.assert_close(model, alone[0], atol=10 * num_rounds * bound, rtol=0)
        assert metrics == pytest.approx(alone[1], rel=1e-4)
        assert (step, learning_rates) == (alone[2], pytest.approx(alone[3]))
        assert torch.equal(model, silos[0][0])


def private(noise_multiplier: float, seed: int | None = 1) -> dict[str, Any]:
    noise = fl.privacy.ClientLevelDP(
        clip=1.0, noise_multiplier=noise_multiplier, mode="distributed", insecure_test_seed=seed
    )
    own = {"aggregator": fl.privacy.SecureAggregation("bonawitz"), "transforms": [noise], "weighting": "uniform"}
    return {**own, "personal": ["net.1.running_*", "net.1.num_batches_tracked"]}


@pytest.mark.filterwarnings("ignore:insecure_test_seed")
def test_silos_that_add_noise_under_a_secure_sum_give_what_one_process_gives(run_ranks: Any, tmp_path: Path) -> None:
    """Each adds integers to its own update, so with the noise of the same seed the sum is the same to the last bit."""
    options = private(noise_multiplier=0.5)
    alone, quiet = (train_alone("fedavg", torch.float64, private(noise)) for noise in (0.5, 0.0))
    make_kits(tmp_path)
    make_keys(tmp_path)
    strategy = FederatedStrategy("fedavg", **options)
    own = replace(settings(strategy.algorithm, strategy.transforms, strategy.aggregator), weighting="uniform")
    with live_coordinator(tmp_path, rules(), own, settings_of_silo(strategy)) as live:
        silos = run_ranks(3, train_silo, live.address, tmp_path, "fedavg", torch.float64, options)
        history = live.coordinator.progress.history
    for model, metrics, step, _ in silos:
        torch.testing.assert_close(model, alone[0], rtol=1e-9, atol=1e-9)
        assert metrics == pytest.approx(alone[1], rel=1e-4)
        assert step == alone[2]
    assert (alone[0] - quiet[0]).abs().max() > 1e-2
    epsilons = [entry["dp_epsilon"] for entry in history]
    assert epsilons == sorted(epsilons)
    assert {entry["dp_mode"] for entry in history} == {"distributed"}
    assert {entry["dp_guarantee"] for entry in history} == {"NOT PRIVATE (insecure_test_seed)"}


class Still(L.LightningModule):
    """A module that training does not move."""

    def __init__(self) -> None:
        super().__init__()
        self.x = torch.nn.Parameter(torch.zeros(20_000))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return 0 * self.x.sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("mode", [pytest.param("local", marks=pytest.mark.slow), "central"])
def test_noise_of_the_coordinator_or_of_a_silo(tmp_path: Path, mode: Any) -> None:
    """One silo of three has come: what it or the coordinator has added is divided by the expected three."""
    make_kits(tmp_path)
    options = {"transforms": [fl.privacy.ClientLevelDP(clip=2.0, noise_multiplier=1.5, mode=mode)]}
    strategy = FederatedStrategy("fedavg", **options)
    sampling = describe_sampling(strategy.cohort, len(NAMES), None)
    own = replace(settings(strategy.algorithm, strategy.transforms), weighting="uniform", sampling=sampling)
    alone = rules(min_silos=1, gather_s=0.0, rounds=1)
    with live_coordinator(tmp_path, alone, own, settings_of_silo(strategy)) as live:
        module = Still()
        silo = FederatedStrategy("fedavg", federation=live.address, kit=tmp_path / "east", **options)
        trainer(silo, max_epochs=1).fit(module, loader_of("east"))
        (entry,) = live.coordinator.progress.history
    assert module.x.std().item() == pytest.approx(1.5 * 2.0 / 3, rel=0.05)
    assert entry["dp_mode"] == mode
    assert entry["dp_epsilon"] > 0


@pytest.mark.parametrize("min_clients", [2 / 3, 3, 5])
def test_the_noise_of_silos_is_enough_for_the_smallest_sum_of_a_round(min_clients: int | float) -> None:
    """A round may open again with fewer silos than the one for which the noise was drawn."""
    aggregator = fl.privacy.SecureAggregation("bonawitz", min_clients=min_clients)
    at_silo, fewest = single_update(aggregator), 3 if min_clients == 2 / 3 else int(min_clients)
    for size in range(fewest, 40):
        assert at_silo.min_clients_of(size) == fewest <= aggregator.min_clients_of(size)


def test_a_silo_that_comes_after_the_last_round_gets_the_last_model(tmp_path: Path) -> None:
    make_kits(tmp_path)
    strategy = FederatedStrategy("fedavg")
    alone = rules(min_silos=1, gather_s=0.0)
    with live_coordinator(tmp_path, alone, settings(strategy.algorithm), settings_of_silo(strategy)) as live:

        def fit(name: str) -> Any:
            module = Scheduled(torch.float64)
            own = trainer(FederatedStrategy("fedavg", federation=live.address, kit=tmp_path / name), max_epochs=3)
            own.fit(module, loader_of(name), validation_of(name))
            return weights(module), own.current_epoch, own.global_step, own.strategy.history

        trained, late = fit("east"), fit("north")
    assert len(trained[3]) == 3
    assert len(late[3]) == 0
    assert late[1:3] == trained[1:3]
    torch.testing.assert_close(late[0], trained[0], rtol=0, atol=0)


class Estimating(Ordinary):
    """A schedule by step, as long as the training."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def test_no_silo_knows_how_many_steps_the_largest_takes(tmp_path: Path) -> None:
    make_kits(tmp_path)
    strategy = FederatedStrategy("fedavg", local_steps=3)
    own = rules(min_silos=1, gather_s=0.0)
    with live_coordinator(tmp_path, own, settings(strategy.algorithm), settings_of_silo(strategy)) as live:

        def fit(**options: Any) -> Any:
            silo = FederatedStrategy("fedavg", federation=live.address, kit=tmp_path / "east", **options)
            own = trainer(silo, max_epochs=3)
            own.fit(Estimating(torch.float64), loader_of("east"), validation_of("east"))
            return own

        with pytest.raises(MisconfigurationException, match="needs the number of steps of the largest silo"):
            fit()
        # With as many for each it is known, although the coordinator says only later who takes part.
        fitted = fit(local_steps=3)
        assert fitted.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.0)
        assert fitted.strategy.view.settings.population == 3


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"aggregator": fl.privacy.SecureAggregation()}, "silos may vanish at any moment"),
        ({"aggregator": fl.privacy.SecureAggregation("bonawitz", dropout=0.1)}, "without dropout"),
        ({"aggregator": fl.privacy.SecureAggregation("bonawitz", keys="keys")}, "they are in the kit"),
        (
            {"aggregator": fl.aggregation.FLTrust(root=TensorDataset(torch.zeros(1, 1), torch.zeros(1)))},
            "a coordinator holds no model",
        ),
    ],
)
def test_what_does_not_run_over_a_coordinator_is_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        FederatedStrategy("fedavg", federation="https://localhost", kit="kit", **options)
