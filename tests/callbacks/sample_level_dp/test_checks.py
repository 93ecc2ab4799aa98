"""What sample-level privacy can't stand beside is refused, and the message names the remedy."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, WeightedRandomSampler

import lightning_fl as fl
from lightning_fl import FederatedStrategy
from lightning_fl.callbacks import PersonalizedEvaluation, SampleLevelDP
from lightning_fl.privacy import PrivacyError
from tests.helpers.training import Ordinary, Plain, Quadratic, image_clients, images, trainer


def refusal(module: L.LightningModule | None = None, data: Any = None, strategy: Any = "fedavg", **options: Any) -> str:
    options["callbacks"] = [SampleLevelDP(noise_multiplier=1.0), *options.get("callbacks", ())]
    with pytest.raises((MisconfigurationException, PrivacyError, ValueError)) as error:
        trainer(strategy, 2, **options).fit(Plain() if module is None else module, data or image_clients((3, 9), 4))
    return str(error.value)


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"strategy": "auto"}, "strategy='fedavg'"),
        ({"strategy": FederatedStrategy(engine="vectorized")}, "engine='sequential'"),
        ({"strategy": FederatedStrategy(fl.algorithms.QFedAvg())}, "without that measurement"),
        ({"accumulate_grad_batches": 2}, "max_physical_batch_size"),
        ({"callbacks": [L.pytorch.callbacks.GradientAccumulationScheduler({1: 2})]}, "max_physical_batch_size"),
        ({"gradient_clip_val": 1.0}, "max_grad_norm clips each example's"),
        ({"precision": "16-true"}, "'bf16-mixed'"),
        ({"precision": "bf16-true"}, "'bf16-mixed'"),
        ({"overfit_batches": 1}, "limit_train_batches"),
        ({"callbacks": [PersonalizedEvaluation({0: image_clients((3,))})], "module": Ordinary()}, "finetune_epochs=0"),
    ],
)
@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
def test_settings(options: dict[str, Any], remedy: str) -> None:
    assert remedy in refusal(**options)


def test_settings_that_change_between_rounds() -> None:
    class Accumulates(L.Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            trainer.gradient_clip_val = 1.0 * trainer.current_epoch

    assert "gradient_clip_val=1.0" in refusal(callbacks=[Accumulates()])


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(images(8), sampler=WeightedRandomSampler([1.0] * 8, 8)),
        DataLoader(images(8), batch_sampler=[[0, 1], [2, 3]]),
        [images(4).tensors],
    ],
)
def test_loaders(loader: Any) -> None:
    clients = fl.datamodules.ClientLoaders({"a": loader})
    assert "Give the client a plain DataLoader" in refusal(data=clients)


class ByHand(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class OwnBackward(Plain):
    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        loss.backward()


class OwnClipping(Plain):
    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        return None


class Summed(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return functional.cross_entropy(self.net(batch[0].double()), batch[1], reduction="sum")


class Penalised(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + 0.1 * self.net[1].weight.square().sum()


class PastTheLayer(Plain):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        hidden = functional.linear(batch[0].flatten(1).double(), self.net[1].weight)
        return functional.cross_entropy(self.net[3](hidden), batch[1])


class InPlace(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.net[2] = nn.ReLU(inplace=True)


@pytest.mark.parametrize(
    ("module", "remedy"),
    [
        (Ordinary(), "GroupNorm"),
        (Quadratic(), "Move it into a layer"),
        (InPlace(), "Set inplace=False"),
        (ByHand(), "Set automatic_optimization=True"),
        (Plain(make_optimizer=lambda params: torch.optim.LBFGS(params)), "Use another optimizer"),
        (OwnBackward(), "Remove it"),
        (OwnClipping(), "Remove it"),
        (Summed(), "must return the mean"),
        (Penalised(), "must return the mean"),
        (PastTheLayer(), "weight_decay"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no")
def test_modules(module: L.LightningModule, remedy: str) -> None:
    assert remedy in refusal(module)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give exactly one of them"),
        ({"noise_multiplier": 1.0, "target_epsilon": 3.0}, "give exactly one of them"),
        ({"noise_multiplier": -1.0}, "noise_multiplier=-1"),
        ({"noise_multiplier": 1.0, "max_grad_norm": 0.0}, "max_grad_norm=0"),
        ({"noise_multiplier": 1.0, "delta": 0.0}, "delta=0"),
        ({"noise_multiplier": 1.0, "method": "gdp"}, "method='gdp'"),
        ({"noise_multiplier": 1.0, "max_epsilon": -1.0}, "max_epsilon=-1"),
        ({"noise_multiplier": 1.0, "max_physical_batch_size": 0}, "max_physical_batch_size=0"),
        ({"noise_multiplier": 1.0, "grad_sample_mode": "ghost"}, "set max_physical_batch_size"),
        ({"target_epsilon": 0.0}, "target_epsilon=0"),
    ],
)
def test_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SampleLevelDP(**options)


def test_a_delta_that_gives_examples_away() -> None:
    callback = SampleLevelDP(noise_multiplier=1.0, delta=0.2)
    with pytest.warns(UserWarning, match="Use a smaller delta"):
        trainer("fedavg", callbacks=[callback]).fit(Plain(), image_clients((9,), 4))


def test_a_target_needs_to_know_the_rounds() -> None:
    callback = SampleLevelDP(target_epsilon=3.0)
    with pytest.raises(MisconfigurationException, match="needs the number of rounds"):
        trainer("fedavg", -1, callbacks=[callback]).fit(Plain(), image_clients((9,), 4))
