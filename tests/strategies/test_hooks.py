"""Whether batches pass Lightning's hooks: they do where something looks at them, and the DEBUG log says what."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    DeviceStatsMonitor,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LambdaCallback,
    LearningRateMonitor,
    ModelCheckpoint,
    RichProgressBar,
    StochasticWeightAveraging,
    Timer,
    TQDMProgressBar,
)
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision, Precision
from lightning.pytorch.profilers import PassThroughProfiler
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import ExponentialLR

import lightning_fl as fl
from lightning_fl.callbacks import FederatedCallback, FederatedProgressBar
from lightning_fl.strategies.hooks import BATCH_HOOKS, STRATEGY_HOOKS, TRANSFER_HOOKS
from tests.helpers.training import Plain, image_clients, loader, trainer, weights

TIGHT = "The local loop is tight."


def passing_on(base: type, hook: str) -> Callable[..., Any]:
    """A method that does what the base class does."""

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(base, hook)(self, *args, **kwargs)

    return method


def with_hook(kind: type, base: type, hook: str) -> type:
    """A subclass of ``kind`` that overrides one hook."""
    return type("Own", (kind,), {hook: passing_on(base, hook)})


@pytest.fixture
def reason(caplog: pytest.LogCaptureFixture) -> Callable[..., str]:
    """What the last round of a fit says of its batches: ``TIGHT``, or the hook that they pass."""

    def of(module: Any = None, strategy: Any = None, data: Any = None, rounds: int = 1, **options: Any) -> str:
        caplog.clear()
        with caplog.at_level(logging.DEBUG, logger="lightning.pytorch"):
            run = trainer(strategy or fl.FederatedStrategy(engine="sequential"), rounds, **options)
            run.fit(Plain() if module is None else module, image_clients((3, 5)) if data is None else data)
        told = [record.getMessage() for record in caplog.records]
        (*_, last) = [line for line in told if line == TIGHT or line.startswith("Batches pass Lightning's hooks: ")]
        return last.removeprefix("Batches pass Lightning's hooks: ").rstrip(".") if last != TIGHT else TIGHT

    return of


def test_the_loop_is_tight_where_nothing_looks_at_batches(reason: Any) -> None:
    assert reason() == TIGHT
    assert reason(strategy=fl.FederatedStrategy(engine="vectorized")) == TIGHT


@pytest.mark.filterwarnings("ignore:You have overridden .* but have passed in a `LightningDataModule`")
@pytest.mark.parametrize("hook", BATCH_HOOKS)
def test_a_hook_of_the_module(reason: Any, hook: str) -> None:
    assert reason(with_hook(Plain, L.LightningModule, hook)()) == f"Own.{hook}"


def test_a_hook_set_on_the_module_itself(reason: Any) -> None:
    module = Plain()
    module.on_after_backward = lambda: None  # type: ignore[method-assign]
    assert reason(module) == "Plain.on_after_backward"


@pytest.mark.parametrize("hook", TRANSFER_HOOKS)
def test_a_hook_of_the_datamodule(reason: Any, hook: str) -> None:
    datamodule = with_hook(fl.datamodules.ClientDatasets, L.LightningDataModule, hook)
    clients = image_clients((3, 5))
    clients.__class__ = datamodule
    assert reason(data=clients) == f"Own.{hook}"


@pytest.mark.parametrize("hook", [hook for hook in BATCH_HOOKS if hasattr(L.Callback, hook)])
def test_a_hook_of_a_callback(reason: Any, hook: str) -> None:
    assert reason(callbacks=[with_hook(L.Callback, L.Callback, hook)()]) == f"Own.{hook}"
    assert reason(callbacks=[LambdaCallback(**{hook: lambda *_: None})]) == f"LambdaCallback.{hook}"


def test_a_callback_that_runs_the_training_step(reason: Any) -> None:
    own = with_hook(FederatedCallback, FederatedCallback, "run_training_step")()
    assert reason(callbacks=[own]) == "Own.run_training_step"
    assert reason(callbacks=[FederatedCallback()]) == TIGHT


@pytest.mark.parametrize("hook", STRATEGY_HOOKS)
def test_a_subclass_of_the_strategy(reason: Any, hook: str) -> None:
    own = with_hook(fl.FederatedStrategy, fl.FederatedStrategy, hook)
    assert reason(strategy=own(engine="sequential")) == f"Own.{hook}"


def test_a_subclass_of_the_strategy_that_does_not_look_at_batches(reason: Any) -> None:
    own = with_hook(fl.FederatedStrategy, fl.FederatedStrategy, "on_test_start")
    assert reason(strategy=own(engine="sequential")) == TIGHT


Make = Callable[[], dict[str, Any]]
TIGHT_OPTIONS: dict[str, Make] = {
    "TQDM": lambda: {"callbacks": [TQDMProgressBar()], "enable_progress_bar": True},
    "Rich": lambda: {"callbacks": [RichProgressBar()], "enable_progress_bar": True},
    "FederatedProgressBar": lambda: {"callbacks": [FederatedProgressBar()], "enable_progress_bar": True},
    "checkpoints": lambda: {
        "callbacks": [ModelCheckpoint(".", every_n_train_steps=2)],
        "enable_checkpointing": True,
    },
    "timer": lambda: {"callbacks": [Timer(interval="step")]},
    "learning rates by epoch": lambda: {"callbacks": [LearningRateMonitor("epoch")], "logger": CSVLogger(".")},
    "accumulation that changes": lambda: {"callbacks": [GradientAccumulationScheduler({0: 2})]},
    "early stopping": lambda: {"callbacks": [EarlyStopping("x", strict=False)]},
    "max_time": lambda: {"max_time": "00:01:00:00"},
    "no profiler": lambda: {"profiler": PassThroughProfiler()},
    "clipping": lambda: {"gradient_clip_val": 0.1},
    "accumulation": lambda: {"accumulate_grad_batches": 2},
    "limit_train_batches": lambda: {"limit_train_batches": 1},
    "overfit_batches": lambda: {"overfit_batches": 1},
    "detect_anomaly": lambda: {"detect_anomaly": True},
    "32-true": lambda: {"precision": "32-true"},
    "64-true": lambda: {"precision": "64-true"},
    "bf16-true": lambda: {"precision": "bf16-true"},
    "bf16-mixed": lambda: {"precision": "bf16-mixed"},
    "16-mixed": lambda: {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]},
}


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize("make", TIGHT_OPTIONS.values(), ids=TIGHT_OPTIONS)
def test_what_leaves_the_loop_tight(reason: Any, make: Make) -> None:
    assert reason(Plain(torch.float32), **make()) == TIGHT


class OwnPrecision(Precision):
    """May do anything with a step."""


class OwnMixedPrecision(MixedPrecision):
    """May do anything with a step."""


class OwnProgressBar(TQDMProgressBar):
    """May do anything with a batch."""


HOOKED_OPTIONS: dict[str, Make] = {
    "LearningRateMonitor.on_train_batch_start": lambda: {
        "callbacks": [LearningRateMonitor("step")],
        "logger": CSVLogger("."),
    },
    "DeviceStatsMonitor.on_train_batch_start": lambda: {
        "callbacks": [DeviceStatsMonitor()],
        "logger": CSVLogger("."),
    },
    "EMAWeightAveraging.on_train_batch_end": lambda: {"callbacks": [EMAWeightAveraging()]},
    "OwnProgressBar.on_train_batch_end": lambda: {"callbacks": [OwnProgressBar()], "enable_progress_bar": True},
    "the precision plug-in OwnPrecision": lambda: {"plugins": [OwnPrecision()]},
    "the precision plug-in OwnMixedPrecision": lambda: {"plugins": [OwnMixedPrecision("bf16-mixed", "cpu")]},
    "the profiler SimpleProfiler": lambda: {"profiler": "simple"},
    "the profiler AdvancedProfiler": lambda: {"profiler": "advanced"},
    "fast_dev_run": lambda: {"fast_dev_run": 2},
}


@pytest.mark.parametrize("expected", HOOKED_OPTIONS)
def test_settings_of_the_trainer_that_look_at_batches(reason: Any, expected: str) -> None:
    assert reason(Plain(torch.float32), **HOOKED_OPTIONS[expected]()) == expected


class Averaged(Plain):
    """Has BatchNorm, for whose statistics weight averaging runs steps without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.net.append(nn.BatchNorm1d(4, dtype=torch.float64))


def test_a_pass_without_gradients(reason: Any) -> None:
    averaging = StochasticWeightAveraging(0.05, swa_epoch_start=1, annealing_epochs=1)
    told = reason(Averaged(), data=image_clients((4, 8)), rounds=2, callbacks=[averaging])
    assert told == "a pass without gradients, which updates BatchNorm's statistics"


def test_lbfgs(reason: Any) -> None:
    assert reason(Plain(make_optimizer=torch.optim.LBFGS)).startswith("LBFGS")


class SharpnessAware(SGD):
    """Takes the gradients a little uphill of where it stands, for which it computes the loss twice."""

    def step(self, closure: Any = None) -> Any:
        closure()
        params = [param for group in self.param_groups for param in group["params"]]
        moves = [0.1 * param.grad for param in params]
        for param, move in zip(params, moves, strict=True):
            param.data.add_(move)
        loss = closure()
        for param, move in zip(params, moves, strict=True):
            param.data.sub_(move)
        super().step()
        return loss


class OwnSGD(SGD):
    """Steps as SGD does."""


def test_an_optimizer_with_a_step_of_its_own(reason: Any) -> None:
    federated, plain = (Plain(make_optimizer=lambda params: SharpnessAware(params, lr=0.1)) for _ in range(2))
    client = fl.datamodules.ClientLoaders([loader()])
    told = reason(federated, data=client, rounds=2)
    assert told == "SharpnessAware.step, which may compute the loss again"
    trainer("auto", 2).fit(plain, loader())
    torch.testing.assert_close(weights(federated), weights(plain), rtol=1e-10, atol=1e-12)


def test_an_optimizer_that_inherits_its_step(reason: Any) -> None:
    def make(params: Any) -> Any:
        optimizer = OwnSGD(params, lr=0.1)
        return [optimizer], [{"scheduler": ExponentialLR(optimizer, 0.5), "interval": "step"}]

    assert reason(Plain(make_optimizer=make)) == TIGHT


class Manual(Plain):
    """Optimizes by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        optimizer: Any = self.optimizers()
        loss = super().training_step(batch, batch_idx)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        return loss


def test_manual_optimization(reason: Any) -> None:
    assert reason(Manual()) == "Manual uses manual optimization"
