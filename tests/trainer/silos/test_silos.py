"""Silos of several processes: the same model as silos of one process with the joint batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

import lightning_fl as fl
from tests.helpers.training import images, measured, trainer, weights

SIZES = (32, 24)
BATCH = 8


class Net(L.LightningModule):
    """A network without random numbers, which logs, with the optimizer that a test asks for."""

    def __init__(self, make_optimizer: Callable[..., Any], norm: bool = False) -> None:
        super().__init__()
        self.make_optimizer = make_optimizer
        self.norm = norm
        self.accuracy = MulticlassAccuracy(4, average="micro")
        self.net: Any = None

    def configure_model(self) -> None:
        if self.net is not None:
            return
        with torch.random.fork_rng():
            torch.manual_seed(0)
            layers = [nn.Flatten(), nn.Linear(16, 7), nn.Tanh(), nn.Linear(7, 4)]
            self.net = nn.Sequential(*layers[:2], *([nn.BatchNorm1d(7)] if self.norm else []), *layers[2:]).double()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        logits = self.net(x.double())
        loss = nn.functional.cross_entropy(logits, y)
        self.accuracy(logits, y)
        self.log("loss", loss, on_step=False, on_epoch=True)
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        self.log("count", float(len(y)), reduce_fx="sum", on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", nn.functional.cross_entropy(self.net(x.double()), y))

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.parameters())


def sgd(params: Any) -> Any:
    return torch.optim.SGD(params, lr=0.1)


def adamw(params: Any) -> Any:
    return torch.optim.AdamW(params, lr=0.01)


CASES: dict[str, dict[str, Any]] = {
    "fedavg": {},
    "fedadam": {"algorithm": "fedadam"},
    "fedavgm": {"algorithm": "fedavgm"},
    "scaffold": {"algorithm": "scaffold"},
    "fedprox": {"algorithm": fl.algorithms.FedProx(mu=0.5)},
    "diloco": {"algorithm": "diloco", "local_steps": 3, "client_optimizer": "keep", "make_optimizer": adamw},
    "clipping": {"gradient_clip_val": 0.05},
    "accumulation": {"accumulate_grad_batches": 2},
}


def fit(case: str, silo: Any, rows_of: int, module: Any = None, **more: Any) -> dict[str, Any]:
    """Two rounds of this process's silo, whose joint batch is of 8 examples."""
    settings = {**CASES[case], **more}
    module = Net(settings.pop("make_optimizer", sgd)) if module is None else module
    of_trainer = {n: settings.pop(n) for n in ("gradient_clip_val", "accumulate_grad_batches") if n in settings}
    strategy = fl.FederatedStrategy(settings.pop("algorithm", "fedavg"), silo=silo, **settings)
    run = trainer(strategy, max_epochs=2, **of_trainer)
    place = run.global_rank // (silo.ranks or 1)
    run.fit(module, DataLoader(images(SIZES[place], place), BATCH // rows_of), DataLoader(images(5, 9), 2))
    return {
        "weights": weights(module),
        "metrics": measured(run),
        "clients": [entry["num_clients"] for entry in strategy.history],
        "examples": [entry["num_examples"] for entry in strategy.history],
        "bytes": [entry["bytes"] for entry in strategy.history] if "bytes" in strategy.history[0] else None,
        "steps": run.global_step,
    }


def assert_same(found: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    for one in found:
        torch.testing.assert_close(one["weights"], expected["weights"], rtol=1e-10, atol=1e-10)
        assert one["metrics"] == pytest.approx(expected["metrics"], rel=1e-6)
        assert one["clients"] == [2, 2]
        assert one["examples"] == [56, 56]
        assert one["steps"] == expected["steps"]


@pytest.mark.parametrize("case", ["scaffold", *(pytest.param(n, marks=pytest.mark.slow) for n in CASES)])
def test_ddp_in_silos_is_one_process_with_the_joint_batch(run_ranks: Any, case: str) -> None:
    alone = run_ranks(2, fit, case, fl.silos.DDP(ranks=1), 1)
    assert_same(run_ranks(4, fit, case, fl.silos.DDP(ranks=2), 2), alone[0])
