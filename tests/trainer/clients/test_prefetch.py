"""The next client's data is read while one trains."""

from __future__ import annotations

import gc
import multiprocessing
import time
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import lightning_fl as fl
from lightning_fl import FederatedStrategy
from lightning_fl.callbacks import FederatedCallback
from tests.helpers.training import Plain, trainer


class Examples(Dataset):
    """A client's examples; the journal gets a line when one is read."""

    def __init__(self, client: int, journal: Path | None = None, seconds: float = 0.0, broken: bool = False) -> None:
        self.client, self.journal, self.seconds, self.broken = client, journal, seconds, broken

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if self.broken:
            raise RuntimeError("no such file")
        if self.journal is not None:
            write(self.journal, f"read {self.client}")
        time.sleep(self.seconds)
        return torch.full((1, 4, 4), 0.1 * self.client + 0.01 * index), torch.tensor(index % 3)


class Dropping(Plain):
    """Draws random numbers in training; notes each step; may fail."""

    journal: Path | None = None
    fails = False

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.fails:
            raise RuntimeError("the step fails")
        if self.journal is not None:
            time.sleep(0.1)  # long enough for a worker to start
            write(self.journal, f"train {round(float(batch[0].min()), 1)}")
        return super().training_step((self.dropout(batch[0]), batch[1]), batch_idx)


def write(journal: Path, line: str) -> None:
    with journal.open("a") as file:
        file.write(f"{line}\n")


def fit(num_workers: int, module: Dropping | None = None, strategy: dict[str, Any] | None = None, **own: Any) -> Any:
    """Two rounds of three clients; returns the module and the strategy."""
    module, broken = module or Dropping(), own.pop("broken", None)
    clients = fl.datamodules.ClientLoaders(
        range(3),
        lambda client: DataLoader(
            Examples(client, broken=client == broken, **own), batch_size=4, shuffle=True, num_workers=num_workers
        ),
    )
    made = FederatedStrategy("fedavg", seed=7, engine="sequential", **(strategy or {}))
    trainer(made, 2).fit(module, clients)
    return module, made


@pytest.mark.parametrize("strategy", [{}, {"local_steps": 4}, {"clients_per_round": 2}], ids=str)
@pytest.mark.spread(1)
def test_the_result_is_that_of_loaders_without_workers(strategy: dict[str, Any]) -> None:
    torch.manual_seed(0)
    start = Dropping().state_dict()
    weights = []
    for num_workers in (0, 1):
        module = Dropping()
        module.load_state_dict(start)
        weights.append(fit(num_workers, module, strategy)[0].state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in start)
    assert any(not torch.equal(weights[0][name], start[name]) for name in start)


def test_a_loader_that_is_made_from_random_numbers_is_the_same() -> None:
    def make(num_workers: int) -> DataLoader:
        return DataLoader(TensorDataset(torch.rand(12, 1, 4, 4), torch.arange(12) % 3), 4, num_workers=num_workers)

    weights = []
    for num_workers in (0, 1):
        torch.manual_seed(0)
        module = Dropping()
        clients = fl.datamodules.ClientLoaders(range(4), lambda client, n=num_workers: make(n))
        trainer(FederatedStrategy("fedavg", seed=7, engine="sequential"), 2).fit(module, clients)
        weights.append(module.net[1].weight.detach().clone())
    assert torch.equal(*weights)


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.spread(1)
def test_workers_read_while_the_client_before_trains(tmp_path: Path, num_workers: int) -> None:
    module = Dropping()
    module.journal = tmp_path / "journal"
    fit(num_workers, module, {"local_steps": 6}, journal=module.journal)
    lines = module.journal.read_text().split("\n")
    last_step = max(i for i, line in enumerate(lines[: lines.index("train 0.1")]) if line == "train 0.0")
    assert (lines.index("read 1") < last_step) == (num_workers == 1)


def test_the_client_whose_data_is_broken_is_named() -> None:
    with pytest.raises(ValueError, match=r"(?s)loader of client 1 raised RuntimeError: .*no such file"):
        fit(1, broken=1)


@pytest.mark.slow
def test_a_client_whose_data_is_broken_is_left_out() -> None:
    with pytest.warns(UserWarning, match="client 1 raised RuntimeError"):
        _, strategy = fit(1, None, {"on_client_error": "skip"}, broken=1)
    assert [list(entry["failed"]) for entry in strategy.history] == [[1], [1]]


@pytest.mark.filterwarnings("ignore:Round .* the loader of client 1 raised")
@pytest.mark.parametrize("engine", ["sequential", "vectorized"])
@pytest.mark.spread(1)
def test_the_workers_of_a_client_that_is_left_out_end(engine: str) -> None:
    class Watching(FederatedCallback):
        def on_group_end(self, trainer: L.Trainer, module: L.LightningModule, *args: Any) -> None:
            children.append(len(set(multiprocessing.active_children()) - before))

    children: list[int] = []
    before = set(multiprocessing.active_children())
    loaders = [DataLoader(Examples(n, broken=n == 1), batch_size=4, num_workers=int(n == 1)) for n in range(3)]
    clients = fl.datamodules.ClientLoaders(range(3), loaders.__getitem__)
    gc.disable()
    try:
        strategy = FederatedStrategy(engine=engine, on_client_error="skip")
        trainer(strategy, 2, callbacks=[Watching()]).fit(Plain(), clients)
    finally:
        gc.enable()
    assert children
    assert children == [0] * len(children)


@pytest.mark.slow
def test_no_worker_is_left_when_a_step_fails() -> None:
    module = Dropping()
    module.fails = True
    with pytest.raises(RuntimeError, match="the step fails"):
        fit(1, module)
    gc.collect()
    assert not multiprocessing.active_children()


def test_seconds_of_waiting_for_data() -> None:
    _, quick = fit(0)
    _, slow = fit(0, seconds=0.01)
    assert slow.history[1]["seconds"]["read"] >= 36 * 0.01 > quick.history[1]["seconds"]["read"]
    assert slow.history[1]["seconds"]["train"] < slow.history[1]["seconds"]["read"]
