"""The step of clients that train together is recorded and replayed; the results stay those of the user's Python."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor

import lightning_fl as fl
from tests.helpers.training import Plain, image_clients, trainer, weights

TWINS = (23, 7, 23, 7, 23)
UNRECORDED = fl.engines.Vectorized(record=False)


class Counting(Plain):
    """Counts how often Python runs its step; recording counts as well."""

    calls = 0
    factor = 1.0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        type(self).calls += 1
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


class ByGlobal(Counting):
    def scale(self, batch_idx: int) -> Any:
        return GLOBALS["factor"]


GLOBALS = {"factor": 1.0}


class Change(L.Callback):
    """Changes what a step reads, at the start of each round."""

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        GLOBALS["factor"] = pl_module.factor = 1.0 + trainer.current_epoch


def fit(kind: type[Counting], engine: Any, rounds: int = 4, callbacks: Any = (), **options: Any) -> tuple[Tensor, int]:
    """Weights after training, and how often Python ran the step."""
    kind.calls = 0
    module = kind(**options)
    strategy = fl.FederatedStrategy("fedavg", engine=engine, seed=3)
    trainer(strategy, rounds, callbacks=list(callbacks)).fit(module, image_clients(TWINS))
    return weights(module), kind.calls


def test_python_is_run_until_a_shape_of_batches_has_come_twice() -> None:
    together, calls = fit(Counting, "vectorized")
    every_step, all_calls = fit(Counting, UNRECORDED)
    torch.testing.assert_close(together, every_step, rtol=1e-12, atol=0)
    assert calls < all_calls / 2


@pytest.mark.parametrize("kind", [ByBatch, ByBatchTensor, ByRound, ByTrainer, LoggingNumber])
def test_a_step_that_looks_at_what_changes_is_run_each_time(kind: type[Counting]) -> None:
    together, calls = fit(kind, "vectorized")
    alone, _ = fit(kind, "sequential")
    _, all_calls = fit(kind, UNRECORDED)
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-11)
    assert calls >= all_calls


@pytest.mark.parametrize("rounds", [4, 8])
def test_a_changed_attribute_is_seen(rounds: int) -> None:
    together, _ = fit(Counting, "vectorized", rounds, [Change()])
    alone, _ = fit(Counting, "sequential", rounds, [Change()])
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=1e-11)


def test_a_changed_global_variable_is_not_seen_unless_each_step_is_run() -> None:
    alone, _ = fit(ByGlobal, "sequential", callbacks=[Change()])
    torch.testing.assert_close(fit(ByGlobal, UNRECORDED, callbacks=[Change()])[0], alone, rtol=1e-9, atol=1e-11)
    GLOBALS["factor"] = 1.0
    recorded, _ = fit(ByGlobal, "vectorized")
    assert not torch.allclose(recorded, alone, rtol=1e-3)


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
