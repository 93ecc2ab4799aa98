"""Silos on their own machines train the model of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, TensorDataset

import lightning_fl as fl
from lightning_fl import FederatedStrategy
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


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"aggregator": fl.privacy.SecureAggregation()}, "silos may vanish at any moment"),
        ({"aggregator": fl.privacy.SecureAggregation("bonawitz", dropout=0.1)}, "without dropout"),
        ({"aggregator": fl.privacy.SecureAggregation("bonawitz", keys="keys")}, "they are in the kit"),
        (
            {
                "aggregator": fl.privacy.SecureAggregation("bonawitz"),
                "transforms": [fl.privacy.ClientLevelDP(mode="distributed", clip=1.0, noise_multiplier=1.0)],
                "weighting": "uniform",
            },
            "does not run in secure sums over a coordinator yet",
        ),
        (
            {"aggregator": fl.aggregation.FLTrust(root=TensorDataset(torch.zeros(1, 1), torch.zeros(1)))},
            "a coordinator holds no model",
        ),
    ],
)
def test_what_does_not_run_over_a_coordinator_is_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        FederatedStrategy("fedavg", federation="https://localhost", kit="kit", **options)
