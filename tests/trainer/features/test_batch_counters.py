"""``batch_idx``, ``trainer.is_last_batch`` and ``trainer.num_training_batches`` are those of a client's own pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ProgressBar
from torch import Tensor

import lightning_fl as fl
from lightning_fl import FederatedStrategy
from lightning_fl.datamodules import ClientLoaders
from tests.helpers.training import Plain, loader, trainer, weights

SIZES = {"a": 9, "b": 4, "c": 14}
NAMES = tuple(SIZES)


def clients(order: Sequence[str] = NAMES) -> ClientLoaders:
    return ClientLoaders({name: loader(SIZES[name], seed=NAMES.index(name)) for name in order})


class Recording(Plain):
    """Notes what the counters are in each batch; the strategy's own attributes name the client."""

    def __init__(self, hooked: bool = False) -> None:
        super().__init__()
        self.seen: list[Any] = []
        if hooked:
            self.on_train_batch_start = self.start  # type: ignore[method-assign]
            self.on_train_batch_end = self.end  # type: ignore[method-assign]

    def note(self, batch_idx: int) -> None:
        own, progress = self.trainer, self.trainer.fit_loop.epoch_loop.batch_progress
        assert progress.is_last_batch == own.is_last_batch
        self.seen.append((batch_idx, own.is_last_batch, own.num_training_batches))

    def start(self, batch: Any, batch_idx: int) -> None:
        self.note(batch_idx)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.note(batch_idx)
        return super().training_step(batch, batch_idx)

    def end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.note(batch_idx)


class Bar(ProgressBar):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def disable(self) -> None:
        pass

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append((batch_idx, self.total_train_batches))


class Watch(L.Callback):
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.seen.append((batch_idx, trainer.is_last_batch, trainer.num_training_batches))


def passes(*lengths: int, times: int = 1) -> list[Any]:
    return [(i, i + 1 == length, length) for length in lengths for i in range(length) for _ in range(times)]


@pytest.mark.parametrize("hooked", [False, True])
def test_they_are_the_clients_own(hooked: bool) -> None:
    module = Recording(hooked)
    trainer(FederatedStrategy(), 2).fit(module, clients())
    assert module.seen == passes(3, 1, 4, times=3 if hooked else 1) * 2


def test_callbacks_see_the_clients_and_progress_bars_the_round() -> None:
    bar, watch = Bar(), Watch()
    trainer(FederatedStrategy(), 2, callbacks=[bar, watch], enable_progress_bar=True).fit(Plain(), clients())
    assert watch.seen == passes(3, 1, 4) * 2
    assert bar.seen == [(i, 8) for i in range(8)] * 2


@pytest.mark.parametrize("hooked", [False, True])
def test_local_epochs_are_counted_one_by_one_as_by_a_plain_trainer(hooked: bool) -> None:
    federated, plain = Recording(hooked), Recording(hooked)
    trainer(FederatedStrategy(local_epochs=2), 1).fit(federated, ClientLoaders([loader(9)]))
    trainer("auto", 2).fit(plain, loader(9))
    assert federated.seen == plain.seen


class ManualSchedule(Plain):
    """Steps its schedule on the last batch of each epoch, as in Lightning's documentation; every second is enough."""

    def __init__(self, in_hook: bool = False) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.rates: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer, schedule = self.optimizers(), self.lr_schedulers()
        optimizer.zero_grad()  # type: ignore[union-attr]
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()  # type: ignore[union-attr]
        self.rates.append(optimizer.param_groups[0]["lr"])  # type: ignore[union-attr]
        if self.trainer.is_last_batch:
            schedule.step()  # type: ignore[union-attr]

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.08)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]


class Flushing(Plain):
    """Accumulates gradients by hand, and flushes what is left on the last batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.steps: list[int] = []

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        self.manual_backward(super().training_step(batch, batch_idx))
        if (batch_idx + 1) % 2 == 0 or batch_idx + 1 == self.trainer.num_training_batches:
            assert self.trainer.is_last_batch == (batch_idx + 1 == self.trainer.num_training_batches)
            optimizer.step()  # type: ignore[union-attr]
            optimizer.zero_grad()  # type: ignore[union-attr]
            self.steps.append(batch_idx)


class FlushingInHook(Plain):
    """Automatic optimization that steps by itself every second batch and on the last one."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        optimizer_closure()
        if batch_idx % 2 or self.trainer.is_last_batch:
            optimizer.step()


KINDS = [ManualSchedule, Flushing, FlushingInHook]


def fit(kind: type[Plain], order: Sequence[str] = NAMES, **options: Any) -> Tensor:
    module = kind()
    trainer(FederatedStrategy(**options), 3).fit(module, clients(order))
    return weights(module)


@pytest.mark.parametrize("kind", KINDS)
def test_one_client_is_a_plain_training(kind: type[Plain]) -> None:
    federated, plain = kind(), kind()
    trainer(FederatedStrategy(client_optimizer="keep", local_epochs=2), 2).fit(federated, ClientLoaders([loader(9)]))
    trainer("auto", 4).fit(plain, loader(9))
    torch.testing.assert_close(weights(federated), weights(plain), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.spread(1)
def test_the_order_of_clients_and_the_number_of_ranks_do_not_matter(kind: type[Plain], run_ranks: Any) -> None:
    expected = fit(kind)
    for order in [("c", "b", "a"), ("b", "c", "a")]:
        torch.testing.assert_close(fit(kind, order), expected, rtol=1e-12, atol=1e-14)
    for found in run_ranks(2, fit, kind):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


def test_a_schedule_that_steps_on_the_last_batch_halves_once_a_round() -> None:
    module = ManualSchedule()
    trainer("fedavg", 4).fit(module, clients())
    assert module.rates == [pytest.approx(rate) for rate in (0.08, 0.04, 0.02, 0.01) for _ in range(8)]


def test_gradients_are_flushed_in_each_client() -> None:
    module = Flushing()
    trainer("fedavg").fit(module, clients())
    assert module.steps == [1, 2, 0, 1, 3]


class Reading(Plain):
    """Weights the last batch of an epoch more, which no step of clients with unequal work may do for all."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        last = batch_idx + 1 == self.trainer.num_training_batches
        return super().training_step(batch, batch_idx) * (2.0 if last else 1.0)


@pytest.mark.parametrize("order", [NAMES, ("b", "a", "c")])
@pytest.mark.parametrize("local_epochs", [1, 2, fl.clients.Between(1, 2)])
@pytest.mark.spread(2)
def test_clients_side_by_side_are_those_one_after_the_other(order: Sequence[str], local_epochs: Any) -> None:
    alone = fit(Reading, engine="sequential", local_epochs=local_epochs)
    together = fit(Reading, order, engine="auto", local_epochs=local_epochs)
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-11)
    equal = ClientLoaders([loader(12, seed=seed) for seed in range(4)])
    modules = [Reading(), Reading()]
    for module, engine in zip(modules, ("sequential", "auto"), strict=True):
        trainer(FederatedStrategy(engine=engine, local_epochs=local_epochs), 2).fit(module, equal)
    torch.testing.assert_close(weights(modules[1]), weights(modules[0]), rtol=1e-9, atol=1e-11)
