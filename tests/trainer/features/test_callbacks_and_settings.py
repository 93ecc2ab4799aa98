"""Lightning's callbacks, Trainer settings and loaders: each compared with a plain Trainer, or with one rank."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BaseFinetuning,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
    Timer,
)
from torch import Tensor
from torch.optim import SGD
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils.data import DataLoader, SubsetRandomSampler

import lightning_fl as fl
from lightning_fl import FederatedStrategy
from tests.helpers.training import Ordinary, Plain, image_clients, images, loader, trainer, weights

Options = Callable[[], dict[str, Any]]


def fit(strategy: Any, module: L.LightningModule, max_epochs: int, val: Any, options: Options) -> L.Trainer:
    data = loader() if strategy == "auto" else fl.datamodules.ClientLoaders([loader()])
    run = trainer(strategy, **{"max_epochs": max_epochs, **options()})
    run.fit(module, data, val)
    return run


def assert_equals_plain(
    make: Callable[[], L.LightningModule], options: Options = dict, rounds: int = 3, rtol: float = 1e-10
) -> tuple[L.Trainer, L.Trainer]:
    """Trains one client that keeps its optimizer, and a plain Trainer; returns both."""
    federated, plain = make(), make()
    val = loader(8, seed=9) if isinstance(plain, Ordinary) else None
    runs = (
        fit(FederatedStrategy(client_optimizer="keep"), federated, rounds, val, options),
        fit("auto", plain, rounds, val, options),
    )
    torch.testing.assert_close(weights(federated), weights(plain), rtol=rtol, atol=rtol * 0.1)
    assert runs[0].current_epoch == runs[1].current_epoch
    assert runs[0].global_step == runs[1].global_step
    return runs


class Finetuned(Plain):
    """Trains its head; a callback unfreezes the backbone."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = self.net[1], self.net[3]

    def configure_optimizers(self) -> Any:
        return SGD([param for param in self.parameters() if param.requires_grad], lr=0.1)


class Unscheduled(Ordinary):
    """Has BatchNorm, for whose statistics weight averaging trains one more epoch, without steps."""

    def __init__(self) -> None:
        super().__init__(torch.float64)

    def configure_optimizers(self) -> Any:
        return SGD(self.parameters(), lr=0.1)


class UnfreezeLater(BaseFinetuning):
    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.backbone)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.backbone, optimizer, lr=0.05)


CALLBACKS: dict[str, tuple[Callable[[], L.LightningModule], Callable[[], L.Callback]]] = {
    "early stopping": (partial(Ordinary, torch.float64), lambda: EarlyStopping("val_loss", patience=1, min_delta=1.0)),
    "accumulation schedule": (Plain, lambda: GradientAccumulationScheduler({0: 1, 1: 4, 2: 2})),
    "average by epoch": (
        Plain,
        lambda: EMAWeightAveraging(decay=0.5, update_every_n_steps=0, update_starting_at_epoch=0),
    ),
    "average by step": (partial(Ordinary, torch.float64), lambda: EMAWeightAveraging(decay=0.5)),
    "stochastic weight averaging": (
        Plain,
        lambda: StochasticWeightAveraging(0.05, swa_epoch_start=1, annealing_epochs=1),
    ),
    "stochastic weight averaging with BatchNorm": (
        Unscheduled,
        lambda: StochasticWeightAveraging(0.05, swa_epoch_start=1, annealing_epochs=1),
    ),
    "finetuning": (Finetuned, UnfreezeLater),
    "backbone finetuning": (Finetuned, lambda: BackboneFinetuning(unfreeze_backbone_at_epoch=1)),
}


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step", "ignore:The.*does not have any trainable")
@pytest.mark.parametrize("name", CALLBACKS)
@pytest.mark.spread(3)
def test_callbacks(name: str) -> None:
    make, callback = CALLBACKS[name]
    _, plain = assert_equals_plain(make, lambda: {"callbacks": [callback()]}, rounds=4)
    assert (plain.current_epoch < 4) == (name == "early stopping")


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step", "ignore:The.*does not have any trainable")
@pytest.mark.filterwarnings("ignore:Checkpoint directory", "ignore:The dirpath has changed")
@pytest.mark.parametrize("name", CALLBACKS)
@pytest.mark.spread(3)
def test_callbacks_go_on_from_a_checkpoint(name: str) -> None:
    make, callback = CALLBACKS[name]

    def train(ckpt_path: str | None = None) -> tuple[Tensor, int]:
        module = make()
        saver = ModelCheckpoint("again" if ckpt_path else "ckpt", filename="{epoch}", save_top_k=-1)
        run = trainer("fedavg", 4, callbacks=[callback(), saver], enable_checkpointing=True)
        clients = image_clients((5, 7, 11), validate=isinstance(module, Ordinary))
        run.fit(module, clients, ckpt_path=ckpt_path, weights_only=True)
        return weights(module), run.global_step

    is_over_or_unfrozen = name == "early stopping" or "finetuning" in name
    whole, steps = train()
    resumed, resumed_steps = train("ckpt/epoch=0.ckpt" if is_over_or_unfrozen else "ckpt/epoch=1.ckpt")
    assert torch.equal(resumed, whole)
    assert resumed_steps == steps


@pytest.mark.parametrize(
    "options",
    [
        {"accumulate_grad_batches": 4},
        {"precision": "64-true"},
        {"overfit_batches": 0.5},
        {"limit_train_batches": 3, "limit_val_batches": 1},
        {"max_steps": 12, "max_epochs": -1},
        {"num_sanity_val_steps": 0},
        {"check_val_every_n_epoch": 2},
        {"fast_dev_run": True},
        {"fast_dev_run": 3},
        {"detect_anomaly": True},
        {"deterministic": True},
        {"profiler": "simple"},
    ],
    ids=str,
)
@pytest.mark.spread(4)
def test_trainer_settings(options: dict[str, Any]) -> None:
    federated, plain = assert_equals_plain(partial(Ordinary, torch.float64), lambda: dict(options))
    assert federated.callback_metrics["val_loss"] == pytest.approx(plain.callback_metrics["val_loss"].item(), rel=1e-6)


def test_bfloat16_autocast() -> None:
    assert_equals_plain(partial(Plain, torch.float32), lambda: {"precision": "bf16-mixed"}, rtol=1e-5)


def test_sixteen_bit_autocast_falls_back_to_bfloat16_as_in_a_plain_trainer() -> None:
    with pytest.warns(UserWarning, match="AMP with fp16 is not supported on CPU. Using"):
        assert_equals_plain(partial(Plain, torch.float32), lambda: {"precision": "16-mixed"}, rtol=1e-5)


def test_learning_rate_monitor_sees_the_rate_of_each_round() -> None:
    def rates(strategy: Any) -> list[float]:
        class Watch(L.Callback):
            seen: list[float] = []  # noqa: RUF012

            def on_train_epoch_start(self, *_: Any) -> None:
                self.seen = [*self.seen, *(values[-1] for values in monitor.lrs.values())]

        def make(params: Any) -> Any:
            optimizer = SGD(params, lr=0.1)
            return [optimizer], [ExponentialLR(optimizer, 0.5)]

        monitor, watch = LearningRateMonitor("epoch"), Watch()
        logger = L.pytorch.loggers.CSVLogger(".")
        fit(strategy, Plain(make_optimizer=make), 3, None, lambda: {"callbacks": [monitor, watch], "logger": logger})
        return watch.seen

    assert rates("fedavg") == rates("auto") == [0.1, 0.05, 0.025]


class Slow(Ordinary):
    """Notes batches and validations."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds
        self.events: list[str] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        time.sleep(self.seconds)
        self.events.append("batch")
        return super().training_step(batch, batch_idx)

    def on_validation_start(self) -> None:
        self.events.append("validation")


def stop_in_time(by_callback: bool, seconds: float = 0.05) -> tuple[list[str], int, Tensor]:
    module, limit = Slow(seconds), timedelta(seconds=0.02)
    options: dict[str, Any] = {"callbacks": [Timer(limit)]} if by_callback else {"max_time": limit}
    run = trainer("fedavg", 5, num_sanity_val_steps=0, **options)
    run.fit(module, image_clients((8, 8), validate=True))
    return module.events, run.current_epoch, weights(module)


@pytest.mark.parametrize("by_callback", [True, False], ids=["Timer", "max_time"])
def test_time_is_up_at_a_rounds_end(by_callback: bool) -> None:
    events, rounds, _ = stop_in_time(by_callback)
    assert events == ["batch"] * 4 + ["validation"]
    assert rounds == 1


def test_time_that_is_up_on_one_rank_stops_all(run_ranks: Any) -> None:
    first, second = run_ranks(2, stop_in_time, False)
    for events, rounds, _ in (first, second):
        assert events == ["batch"] * 2 + ["validation"]
        assert rounds == 1
    assert torch.equal(first[2], second[2])


def test_overfit_batches_reads_in_order_whatever_the_sampler() -> None:
    class Seeing(Plain):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            seen.append(batch[0].sum().item())
            return super().training_step(batch, batch_idx)

    data, found = images(32), {}
    for strategy in ("auto", "fedavg"):
        seen: list[float] = []
        own = DataLoader(data, 4, sampler=SubsetRandomSampler(range(32)))
        clients = own if strategy == "auto" else fl.datamodules.ClientLoaders([own])
        with pytest.warns(UserWarning, match="overfit") if strategy == "auto" else nullcontext():
            trainer(strategy, 2, overfit_batches=2).fit(Seeing(), clients)
        found[strategy] = seen
    assert found["fedavg"] == found["auto"]
