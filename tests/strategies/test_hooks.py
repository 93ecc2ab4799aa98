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

import lightning_fl as fl
from lightning_fl.callbacks import FederatedCallback, FederatedProgressBar
from lightning_fl.strategies.hooks import BATCH_HOOKS, STRATEGY_HOOKS, TRANSFER_HOOKS
from tests.helpers.training import Plain, image_clients, trainer

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


@pytest.mark.filterwarnings("ignore:Checkpoint directory", "ignore:.*AMP with fp16 is not supported on CPU")
@pytest.mark.parametrize(
    "options",
    [
        {"callbacks": [TQDMProgressBar()], "enable_progress_bar": True},
        {"callbacks": [RichProgressBar()], "enable_progress_bar": True},
        {"callbacks": [FederatedProgressBar()], "enable_progress_bar": True},
        {"callbacks": [ModelCheckpoint(".", every_n_train_steps=2)], "enable_checkpointing": True},
        {"callbacks": [Timer(interval="step")]},
        {"callbacks": [LearningRateMonitor("epoch")], "logger": CSVLogger(".")},
        {"callbacks": [GradientAccumulationScheduler({0: 2})]},
        {"callbacks": [EarlyStopping("x", strict=False)]},
        {"max_time": "00:01:00:00"},
        {"profiler": PassThroughProfiler()},
        {"gradient_clip_val": 0.1},
        {"accumulate_grad_batches": 2},
        {"limit_train_batches": 1},
        {"overfit_batches": 1},
        {"detect_anomaly": True},
        *({"precision": precision} for precision in ("32-true", "64-true", "bf16-true", "bf16-mixed", "16-mixed")),
    ],
    ids=lambda options: ",".join(options),
)
def test_what_leaves_the_loop_tight(reason: Any, options: dict[str, Any]) -> None:
    assert reason(Plain(torch.float32), **options) == TIGHT


class OwnPrecision(Precision):
    """May do anything with a step."""


class OwnMixedPrecision(MixedPrecision):
    """May do anything with a step."""


class OwnProgressBar(TQDMProgressBar):
    """May do anything with a batch."""


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"callbacks": [LearningRateMonitor("step")], "logger": CSVLogger(".")}, "LearningRateMonitor.on_train_batch"),
        ({"callbacks": [LearningRateMonitor()], "logger": CSVLogger(".")}, "LearningRateMonitor.on_train_batch_start"),
        ({"callbacks": [DeviceStatsMonitor()], "logger": CSVLogger(".")}, "DeviceStatsMonitor.on_train_batch_start"),
        ({"callbacks": [EMAWeightAveraging()]}, "EMAWeightAveraging.on_train_batch_end"),
        ({"callbacks": [OwnProgressBar()], "enable_progress_bar": True}, "OwnProgressBar.on_train_batch_end"),
        ({"plugins": [OwnPrecision()]}, "the precision plug-in OwnPrecision"),
        ({"plugins": [OwnMixedPrecision("bf16-mixed", "cpu")]}, "the precision plug-in OwnMixedPrecision"),
        ({"profiler": "simple"}, "the profiler SimpleProfiler"),
        ({"profiler": "advanced"}, "the profiler AdvancedProfiler"),
        ({"fast_dev_run": True}, "fast_dev_run"),
        ({"fast_dev_run": 2}, "fast_dev_run"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_settings_of_the_trainer_that_look_at_batches(reason: Any, options: dict[str, Any], expected: str) -> None:
    assert reason(Plain(torch.float32), **options).startswith(expected)


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
    assert reason(Manual()) == "Manual optimizes by hand"
