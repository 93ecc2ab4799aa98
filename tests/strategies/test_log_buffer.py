"""How often a federation calls Lightning's bookkeeping of logged values."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch

import lightning_fl as fl
from lightning_fl.strategies.results import ResultCollection
from tests.helpers.training import Plain, image_clients, trainer

SIZES = (9, 12, 5)


class Logs(Plain):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = {"on_step": False, "on_epoch": True, **options}

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss, **self.options)
        return loss


class LooksAtBatches(L.Callback):
    def on_train_batch_end(self, *_: Any) -> None:
        return None


def num_calls(
    monkeypatch: pytest.MonkeyPatch, engine: str, callbacks: Any = (), sizes: Any = SIZES, **options: Any
) -> int:
    calls = 0
    log = ResultCollection.log

    def count(*args: Any, **kwargs: Any) -> None:
        nonlocal calls
        calls += 1
        log(*args, **kwargs)

    module = Logs(**options)
    federation = trainer(fl.FederatedStrategy("fedavg", engine=engine), callbacks=list(callbacks))
    with monkeypatch.context() as patched:
        patched.setattr(ResultCollection, "log", count)
        federation.fit(module, image_clients(sizes))
    assert "log" not in vars(module)
    return calls


def test_a_mean_over_the_epoch_is_logged_once_a_client(monkeypatch: pytest.MonkeyPatch) -> None:
    assert num_calls(monkeypatch, "sequential") == len(SIZES)


def test_a_client_group_logs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert num_calls(monkeypatch, "vectorized", sizes=(8, 8, 8)) == 1


@pytest.mark.parametrize(
    ("callbacks", "options"),
    [([LooksAtBatches()], {}), ([], {"on_step": True}), ([], {"reduce_fx": "max"}), ([], {"batch_size": 2})],
    ids=["a hook looks at batches", "on_step", "max", "batch_size"],
)
def test_everything_else_is_logged_in_each_step(
    monkeypatch: pytest.MonkeyPatch, callbacks: Any, options: dict[str, Any]
) -> None:
    num_batches = sum(-(-size // 4) for size in SIZES)
    assert num_calls(monkeypatch, "sequential", callbacks, **options) == num_batches


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's, at a graph break
def test_a_compiled_training_step_logs_the_same() -> None:
    found = []
    for is_compiled in (False, True):
        module = Logs()
        if is_compiled:
            module.training_step = torch.compile(module.training_step, backend="eager")  # type: ignore[method-assign]
        federation = trainer(fl.FederatedStrategy("fedavg", engine="sequential"), 2)
        federation.fit(module, image_clients((8, 12, 8)))
        found.append(float(federation.callback_metrics["loss"]))
    assert found[0] == pytest.approx(found[1], rel=1e-6)
