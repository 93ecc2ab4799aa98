"""On a GPU every algorithm trains what it trains on a CPU, in each engine, precision and privacy class.

    python -m pytest tests/gpu

Without a GPU all of it is skipped; ``GPU_TESTS_ON=cpu`` tries the tests themselves.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

import lightning_fl as fl
from lightning_fl.callbacks import SampleLevelDP
from lightning_fl.privacy import ClientLevelDP, SecureAggregation
from tests.contract.test_contract import ENTRIES
from tests.helpers.training import Ordinary, Plain, image_clients, trainer, weights

PLACE = os.environ.get("GPU_TESTS_ON", "gpu")
pytestmark = [
    pytest.mark.skipif(PLACE == "gpu" and not torch.cuda.is_available(), reason="no GPU here"),
    pytest.mark.filterwarnings("ignore:insecure_test_seed", "ignore:Be aware that when using `ckpt_path`"),
]
ROUNDS = 3
SIZES = (5, 7, 23)


def fit(strategy: fl.FederatedStrategy, module: Any, accelerator: str, **options: Any) -> torch.Tensor:
    """The weights after training, on the CPU."""
    rounds = options.pop("max_epochs", ROUNDS)
    checkpoint = options.pop("ckpt_path", None)
    clients = image_clients(options.pop("sizes", SIZES), validate=isinstance(module, Ordinary))
    fit = trainer(strategy, rounds, accelerator=accelerator, devices=1, **options)
    fit.fit(module, clients, ckpt_path=checkpoint, weights_only=False)
    return weights(module).cpu()


@pytest.mark.parametrize("engine", ["sequential", "auto"])
@pytest.mark.parametrize("name", ENTRIES)
def test_every_algorithm(name: str, engine: str) -> None:
    entry = ENTRIES[name]

    def train(accelerator: str) -> torch.Tensor:
        strategy = fl.FederatedStrategy(entry.algorithm, engine=engine, seed=0, **entry.options)  # type: ignore[arg-type]
        return fit(strategy, entry.module(), accelerator)

    torch.testing.assert_close(train(PLACE), train("cpu"), rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "make"), [("fedavg", None), ("fedavg", Ordinary), ("fedprox", None), ("scaffold", None)]
)
@pytest.mark.parametrize("clients_per_step", [None, 1])
def test_captured_steps(name: str, make: Any, clients_per_step: int | None, caplog: pytest.LogCaptureFixture) -> None:
    entry = ENTRIES[name]

    def train(engine: Any, accelerator: str) -> torch.Tensor:
        strategy = fl.FederatedStrategy(entry.algorithm, engine=engine, seed=0, **entry.options)
        return fit(strategy, entry.module() if make is None else make(torch.float64), accelerator, sizes=(32,) * 4)

    with caplog.at_level(logging.DEBUG, "lightning_fl.engines"):
        captured = train(fl.engines.Vectorized(clients_per_step, capture_steps=True), PLACE)
    torch.testing.assert_close(captured, train("sequential", "cpu"), rtol=0, atol=1e-9)
    # Why a GPU has refused a capture is what this test is for.
    assert "Captured a step" in caplog.text
    assert ("Captured 8 steps" in caplog.text) == (make is None)
    assert "not replayed" not in caplog.text.replace("so that its steps are not replayed", "")


class Dropping(Plain):
    """Draws random numbers on the GPU in each step."""

    def __init__(self) -> None:
        super().__init__()
        self.net.insert(3, nn.Dropout(0.5))


@pytest.mark.filterwarnings("ignore:training_step draws random numbers")
def test_captured_steps_draw_the_same_random_numbers() -> None:
    def train(captures: bool) -> torch.Tensor:
        strategy = fl.FederatedStrategy("fedavg", engine=fl.engines.Vectorized(capture_steps=captures), seed=0)
        return fit(strategy, Dropping(), PLACE, sizes=(32,) * 4, max_epochs=5)

    torch.testing.assert_close(train(True), train(False), rtol=0, atol=1e-9)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_precisions(precision: Any) -> None:
    def train(accelerator: str) -> torch.Tensor:
        strategy = fl.FederatedStrategy("fedavg", seed=0)
        return fit(strategy, Ordinary(), accelerator, precision=precision)

    torch.testing.assert_close(train(PLACE), train("cpu"), rtol=0, atol=1e-4 if precision == "32-true" else 0.05)


@pytest.mark.parametrize("name", ["fedadam", "scaffold", "ditto"])
def test_resuming_is_exact(tmp_path: Path, name: str) -> None:
    entry = ENTRIES[name]

    def train(**options: Any) -> torch.Tensor:
        strategy = fl.FederatedStrategy(entry.algorithm, seed=0, **entry.options)
        return fit(strategy, entry.module(), PLACE, **options)

    keep = ModelCheckpoint(tmp_path, save_last=True, every_n_epochs=1)
    train(max_epochs=1, callbacks=[keep], enable_checkpointing=True)
    assert torch.equal(train(ckpt_path=tmp_path / "last.ckpt"), train())


def test_noise_for_clients_is_that_of_the_cpu() -> None:
    def train(accelerator: str) -> torch.Tensor:
        noise = ClientLevelDP(1.0, 0.5, delta=1e-5, insecure_test_seed=1)
        strategy = fl.FederatedStrategy("fedavg", transforms=[noise], seed=0)
        return fit(strategy, ENTRIES["fedavg"].module(), accelerator)

    torch.testing.assert_close(train(PLACE), train("cpu"), rtol=0, atol=1e-6)


@pytest.mark.parametrize("protocol", ["pairwise", "bonawitz"])
def test_a_secure_sum_is_that_of_the_plain_mean(protocol: str) -> None:
    def train(aggregator: Any) -> torch.Tensor:
        strategy = fl.FederatedStrategy("fedavg", aggregator=aggregator, seed=0)
        return fit(strategy, ENTRIES["fedavg"].module(), PLACE)

    secure = SecureAggregation(protocol=protocol, clip=8.0)  # type: ignore[arg-type]
    torch.testing.assert_close(train(secure), train(None), rtol=0, atol=1e-3)


def test_noise_for_examples() -> None:
    def train(accelerator: str) -> torch.Tensor:
        noise = SampleLevelDP(noise_multiplier=1.0, max_grad_norm=1.0, delta=1e-5, insecure_test_seed=1)
        strategy = fl.FederatedStrategy("fedavg", seed=0)
        return fit(strategy, ENTRIES["fedavg"].module(), accelerator, callbacks=[noise])

    torch.testing.assert_close(train(PLACE), train("cpu"), rtol=0, atol=1e-6)


def train_on_the_same_gpu() -> torch.Tensor:
    return fit(fl.FederatedStrategy("fedavg", seed=0), ENTRIES["fedavg"].module(), PLACE)


def test_two_ranks_share_a_gpu(run_ranks: Any) -> None:
    for trained in run_ranks(2, train_on_the_same_gpu):
        torch.testing.assert_close(trained, train_on_the_same_gpu(), rtol=0, atol=1e-9)
