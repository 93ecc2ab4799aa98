"""A resumed run forms the client groups that the uninterrupted one forms, and so gives the same bits."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

import lightning_fl as fl
from lightning_fl.strategies.driver import RoundDriver
from tests.helpers.training import trainer, weights

ROUNDS = 4


@dataclass(frozen=True)
class Chosen(fl.clients.Cohort):
    """The clients of each round, in turn."""

    rounds: Sequence[Sequence[int]]

    def draw(self, sampling: Any, round: int, rng: Any, prepared: Any) -> np.ndarray:
        return np.array(self.rounds[round % len(self.rounds)])


class Groups(L.Callback):
    """Notes the groups of each round."""

    def __init__(self) -> None:
        self.found: dict[int, list[tuple[Any, ...]]] = {}

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.found[trainer.current_epoch] = list(trainer.strategy.active_driver.trained_groups)


def fit(folder: Path, module: Any, data: Any, path: Any = None, **options: Any) -> tuple[Any, Tensor]:
    own = Groups()
    checkpoint = ModelCheckpoint(folder / ("again" if path else "whole"), filename="{epoch}", save_top_k=-1)
    strategy = fl.FederatedStrategy("fedavg", engine="auto", seed=5, **options)
    run = trainer(strategy, ROUNDS, callbacks=[own, checkpoint], enable_checkpointing=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The dirpath has changed")
        warnings.filterwarnings("ignore", "Checkpoint directory")
        run.fit(module, data, ckpt_path=path, weights_only=True)
    return own.found, weights(module)


def check(folder: Path, make_module: Any, make_data: Any, rounds: Sequence[int] = (0, 2), **options: Any) -> Any:
    """Compares a run with those that go on after some of its rounds; returns its groups."""
    found, whole = fit(folder, make_module(), make_data(), **options)
    for last in rounds:
        again, resumed = fit(folder, make_module(), make_data(), folder / f"whole/epoch={last}.ckpt", **options)
        assert again == {round: groups for round, groups in found.items() if round > last}, last
        assert torch.equal(resumed, whole), last
    return found


class Lengths(Dataset):
    """Six examples of one length."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> Tensor:
        return torch.linspace(0.1, 1.0 + index, self.length)


class Of(L.LightningModule):
    """Moves its parameters to the batches' squared means; those of width 3 use one parameter more."""

    def __init__(self, lr: float = 0.1) -> None:
        super().__init__()
        self.lr = lr
        self.x, self.other = nn.Parameter(torch.full((8,), 0.3)), nn.Parameter(torch.full((8,), 0.7))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (batch,) = batch if isinstance(batch, list) else (batch,)
        extra = self.other.square() if batch.shape[-1] == 3 else 0.0
        return (torch.tanh(self.x) - batch.square().mean() + extra).square().sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


LENGTHS = (2, 4, 2, 4, 2, 4, 2, 4)
COHORTS = Chosen([(0, 1, 3), (0, 1, 2, 3), (1, 3, 5, 7), (0, 1, 2, 4, 6)])


def split_apart(folder: Path) -> Any:
    """Clients whose batches can't be stacked, as shows when they are read, are planned together at first."""

    def make_data() -> Any:
        return fl.datamodules.ClientDatasets([Lengths(n) for n in LENGTHS], batch_size=2)

    return check(folder, Of, make_data, cohort=COHORTS, clients_per_round=4)


class Strange(Of):
    """Does something in round 1 that clients can only do one after the other."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.current_epoch == 1:
            self.last = self.current_epoch
        return super().training_step(batch, batch_idx)


def strange(folder: Path) -> Any:
    return check(folder, Strange, lambda: fl.datamodules.ClientDatasets([Lengths(2)] * 4, batch_size=2))


def sparing(folder: Path) -> Any:
    """Which parameters get a gradient shows in round 0; the shape of then does not come again."""
    shapes = [(3, 3), *[(3 * n, 2) for n in range(1, 10)]]

    def make_data() -> Any:
        return fl.datamodules.ClientDatasets([TensorDataset(torch.ones(own)) for own in shapes], batch_size=3)

    return check(folder, Of, make_data, cohort=Chosen([range(9), range(1, 10)]), clients_per_round=9)


def test_clients_that_were_split_apart_stay_so(tmp_path: Path) -> None:
    assert split_apart(tmp_path)[1] == [(0,), (1, 3), (2,)]  # planned anew, 0 and 2 would train together


def test_who_trains_alone_after_a_fault_still_does(tmp_path: Path) -> None:
    found = strange(tmp_path)
    assert found[0] == [(0, 1, 2, 3)]
    assert found[3] == [(0,), (1,), (2,), (3,)]


def test_clients_whose_shapes_use_other_parameters_stay_apart(tmp_path: Path) -> None:
    assert all(len(group) == 1 for groups in sparing(tmp_path).values() for group in groups)


@pytest.mark.parametrize("run", [split_apart, strange, sparing])
def test_these_tests_would_show(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resume = RoundDriver.resume

    def without_memory(self: RoundDriver, state: Any, progress: Any) -> None:
        resume(self, state, {**progress, "grouping": {}})

    monkeypatch.setattr(RoundDriver, "resume", without_memory)
    with pytest.raises(AssertionError):
        run(tmp_path)


@pytest.mark.parametrize("run", [split_apart, strange])
@pytest.mark.spread(1)
def test_on_two_ranks(run: Any, run_ranks: Any, tmp_path: Path) -> None:
    assert len(run_ranks(2, run, tmp_path)) == 2
