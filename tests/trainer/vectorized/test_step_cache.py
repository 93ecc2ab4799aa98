"""The step of clients that train together is recorded and replayed; the results stay those of the user's Python."""

from __future__ import annotations

import functools
import os
import types
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

import lightning_fl as fl
from lightning_fl.strategies.vectorized import step_cache as replay
from lightning_fl.strategies.vectorized.log_capture import LogCapture
from tests.helpers.training import Plain, image_clients, trainer, weights

EQUAL, UNEQUAL = (23,) * 5, (23, 7, 23, 7, 23)
UNRECORDED = fl.engines.Vectorized(record=False)


class Counting(Plain):
    factor = 1.0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) * self.scale(batch_idx)

    def scale(self, batch_idx: int) -> Any:
        return self.factor


class ByBatch(Counting):
    def scale(self, batch_idx: int) -> Any:
        return 2.0 if batch_idx % 2 else 1.0


class ByBatchTensor(Counting):
    def scale(self, batch_idx: int) -> Any:
        return torch.tensor(1.0) * (batch_idx + 1)


class ByRound(Counting):
    def scale(self, batch_idx: int) -> Any:
        return 1.0 + self.current_epoch


class ByTrainer(Counting):
    def scale(self, batch_idx: int) -> Any:
        return 3.0 if self.trainer.global_step > 4 else 1.0


class LoggingNumber(Counting):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.log("factor", type(self).factor, on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)


class ByRoundIfThereIsOne(Counting):
    def scale(self, batch_idx: int) -> Any:
        try:
            return 1.0 + self.trainer.current_epoch
        except Exception:
            return 1.0


class HoldingTrainer(Counting):
    def on_fit_start(self) -> None:
        self.held = types.SimpleNamespace(trainer=self.trainer)

    def scale(self, batch_idx: int) -> Any:
        return 1.0 + self.held.trainer.current_epoch


class HoldingOptimizer(Counting):
    def configure_optimizers(self) -> Any:
        self.optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.9)
        return [self.optimizer], [{"scheduler": schedule, "interval": "step"}]

    def scale(self, batch_idx: int) -> Any:
        return 1.0 + 5 * self.optimizer.param_groups[0]["lr"]


class ByEnvironment(Counting):
    def scale(self, batch_idx: int) -> Any:
        return float(os.environ["FACTOR"])


GLOBALS = {"factor": 1.0}


class Change(L.Callback):
    """Changes what a step reads, at the start of each round."""

    def __init__(self, change: Callable[[Any, float], Any]) -> None:
        self.change = change

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.change(pl_module, 1.0 + trainer.current_epoch)


def set_factor(module: Any, factor: float) -> None:
    module.factor = factor


@pytest.fixture(autouse=True)
def _few_are_recorded_as_soon_as_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "USES_BY_FEW", replay.USES)


def fit(
    kind: Any, engine: Any, rounds: int = 4, callbacks: Any = (), sizes: Any = EQUAL, **of_trainer: Any
) -> tuple[Tensor, int]:
    """Weights after training, and how often Python ran the step of clients together; recording counts as well."""
    module, calls = kind(), []
    strategy = fl.FederatedStrategy("fedavg", engine=engine, seed=3)
    with pytest.MonkeyPatch.context() as patch:
        run = LogCapture.__call__
        patch.setattr(LogCapture, "__call__", lambda *args: (calls.append(1), run(*args))[1])
        trainer(strategy, rounds, callbacks=list(callbacks), **of_trainer).fit(module, image_clients(sizes))
    return weights(module), len(calls)


@pytest.mark.parametrize("sizes", [EQUAL, UNEQUAL])
def test_python_is_run_until_a_shape_of_batches_has_come_twice(sizes: Any) -> None:
    together, calls = fit(Counting, "vectorized", sizes=sizes)
    every_step, all_calls = fit(Counting, UNRECORDED, sizes=sizes)
    torch.testing.assert_close(together, every_step, rtol=1e-12, atol=0)
    assert calls < all_calls / 2


def test_steps_of_few_clients_are_recorded_later(monkeypatch: pytest.MonkeyPatch) -> None:
    _, soon = fit(Counting, "vectorized")
    monkeypatch.setattr(replay, "USES_BY_FEW", 6)
    _, later = fit(Counting, "vectorized")
    assert later > soon
    monkeypatch.setattr(replay, "FEW", 5)
    assert fit(Counting, "vectorized")[1] == soon


@pytest.mark.parametrize(
    "kind",
    [
        *(ByBatch, ByBatchTensor, ByRound, ByTrainer, ByRoundIfThereIsOne, HoldingTrainer, HoldingOptimizer),
        LoggingNumber,
    ],
)
def test_a_step_that_looks_at_what_changes_is_run_each_time(kind: type[Counting]) -> None:
    together, calls = fit(kind, "vectorized")
    alone, _ = fit(kind, "sequential")
    _, all_calls = fit(kind, UNRECORDED)
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-11)
    assert calls >= all_calls


@pytest.mark.parametrize("rounds", [4, 8])
def test_a_changed_attribute_is_seen(rounds: int) -> None:
    together, _ = fit(Counting, "vectorized", rounds, [Change(set_factor)])
    alone, _ = fit(Counting, "sequential", rounds, [Change(set_factor)])
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-11)


class Loss:
    """A criterion that is no module."""

    __slots__ = ("factor",)

    def __init__(self) -> None:
        self.factor = 1.0

    def __call__(self, loss: Tensor) -> Tensor:
        return loss * self.factor


class HiddenLoss(nn.Module):
    factor = 1.0

    def forward(self, loss: Tensor) -> Tensor:
        return loss * self.factor


def scaled(read: Callable[[Any], Any], **attributes: Callable[[], Any]) -> Callable[[], Plain]:
    """Makes a module with these attributes, whose loss is multiplied by what ``read`` finds."""

    class Scaled(Counting):
        in_class: dict[str, float]

        def __init__(self) -> None:
            super().__init__()
            GLOBALS["factor"] = 1.0
            type(self).in_class = {"factor": 1.0}
            for name, make in attributes.items():
                setattr(self, name, make())

        def scale(self, batch_idx: int) -> Any:
            return read(self)

    return Scaled


class Buffered(Counting):
    """A buffer that is no part of the state."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("w", torch.tensor(1.0, dtype=torch.float64), persistent=False)

    def scale(self, batch_idx: int) -> Any:
        return self.w


class ReadingBuffer(Buffered):
    def scale(self, batch_idx: int) -> Any:
        return float(self.w)


def change_twice(module: Any, factor: float) -> None:
    """A number may end up where the one before it was in memory."""
    module.config.factor *= 1.9
    module.config.factor += 0.01


def one() -> Tensor:
    return torch.ones(2, dtype=torch.float64)


DEEP: Callable[[], Any] = lambda: {"a": {"b": {"c": {"factor": 1.0}}}}  # noqa: E731
CHANGES: dict[str, tuple[Any, Callable[[Any, float], Any]]] = {
    "class": (scaled(lambda m: m.in_class["factor"]), lambda m, f: type(m).in_class.update(factor=f)),
    "global": (scaled(lambda m: GLOBALS["factor"]), lambda m, f: GLOBALS.update(factor=f)),
    "deep": (scaled(lambda m: m.x["a"]["b"]["c"]["factor"], x=DEEP), lambda m, f: m.x["a"]["b"]["c"].update(factor=f)),
    "long": (scaled(lambda m: m.x[3], x=lambda: [1.0] * 1500), lambda m, f: m.x.__setitem__(3, f)),
    "callable": (scaled(lambda m: m.x(1.0), x=Loss), lambda m, f: setattr(m.x, "factor", f)),
    "hidden module": (scaled(lambda m: m.x[0](1.0), x=lambda: [HiddenLoss()]), lambda m, f: set_factor(m.x[0], f)),
    "partial": (
        scaled(lambda m: m.x(), x=lambda: functools.partial(sum, [1.0])),
        lambda m, f: m.x.args[0].__setitem__(0, f),
    ),
    "twice": (scaled(lambda m: m.config.factor, config=lambda: types.SimpleNamespace(factor=1.0)), change_twice),
    "buffer replaced": (Buffered, lambda m, f: setattr(m, "w", torch.tensor(f, dtype=torch.float64))),
    "buffer read": (ReadingBuffer, lambda m, f: m.w.data.fill_(f)),
    "tensor": (scaled(lambda m: m.x.sum(), x=one), lambda m, f: m.x.data.fill_(f)),
    "tensor copied": (scaled(lambda m: torch.tensor([*m.x, 1.0]).sum(), x=one), lambda m, f: m.x.fill_(f)),
    "tensor as list": (scaled(lambda m: sum(m.x.tolist()), x=one), lambda m, f: m.x.fill_(f)),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_change_of_what_the_step_can_reach_is_seen(case: str) -> None:
    kind, change = CHANGES[case]
    together, _ = fit(kind, "vectorized", 2, [Change(change)])
    alone, _ = fit(kind, "sequential", 2, [Change(change)])
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-11)


def test_a_tensor_that_is_written_to_needs_no_new_recording() -> None:
    kind, change = CHANGES["tensor"]
    assert fit(kind, "vectorized", 8, [Change(change)])[1] == fit(kind, "vectorized", 8)[1]


@pytest.mark.parametrize("hook", ["on_train_epoch_start", "on_train_epoch_end"])
def test_parameters_may_be_frozen_and_unfrozen(hook: str) -> None:
    class Deep(Plain):
        def __init__(self) -> None:
            super().__init__()
            for index in (3, 4):
                self.net.insert(index, nn.Linear(8, 8, dtype=torch.float64))
                nn.init.eye_(self.net[index].weight)
                nn.init.zeros_(self.net[index].bias)
            self.net[4].requires_grad_(False)

    class Swap(L.Callback):
        pass

    def swap(self: Any, trainer: L.Trainer, pl_module: Any) -> None:
        pl_module.net[3].requires_grad_(trainer.current_epoch < 2)
        pl_module.net[4].requires_grad_(trainer.current_epoch >= 2)

    setattr(Swap, hook, swap)
    together, _ = fit(Deep, "vectorized", callbacks=[Swap()])
    torch.testing.assert_close(together, fit(Deep, "sequential", callbacks=[Swap()])[0], rtol=1e-9, atol=1e-11)


def test_detect_anomaly_keeps_the_autograd_of_each_step() -> None:
    assert fit(Counting, "vectorized", detect_anomaly=True)[1] >= fit(Counting, UNRECORDED)[1]


def test_what_happens_outside_the_process_is_not_seen_unless_each_step_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    change = Change(lambda module, factor: monkeypatch.setenv("FACTOR", str(factor)))
    alone, _ = fit(ByEnvironment, "sequential", callbacks=[change])
    torch.testing.assert_close(fit(ByEnvironment, UNRECORDED, callbacks=[change])[0], alone, rtol=1e-9, atol=1e-11)
    assert not torch.allclose(fit(ByEnvironment, "vectorized", callbacks=[change])[0], alone, rtol=1e-3)


def test_compiling_what_cannot_be_recorded_warns() -> None:
    with pytest.warns(UserWarning, match="compile=True.*batch_idx"):
        fit(ByBatch, fl.engines.Vectorized(compile=True))
    with pytest.raises(ValueError, match="record=False"):
        fl.engines.Vectorized(record=False, compile=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's compiler warns of parts of torch
def test_compiled_it_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR", "")  # which torch's compiler sets
    compiled, _ = fit(Counting, fl.engines.Vectorized(compile=True))
    torch.testing.assert_close(compiled, fit(Counting, "sequential")[0], rtol=1e-9, atol=1e-11)
