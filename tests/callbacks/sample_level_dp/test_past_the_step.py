"""Only the step whose gradient was clipped and noised may change what is trained, and each recorded step happens."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Timer
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import lightning_fl as fl
from lightning_fl.privacy import PrivacyError
from tests.helpers.coupled import NUM_CLASSES, NUM_FEATURES, Case, Net, Writes, examples
from tests.helpers.privacy import private
from tests.helpers.training import trainer


def train(module: L.LightningModule, data: Any = None, **options: Any) -> L.Trainer:
    clients = Case(Net).clients() if data is None else data
    run = trainer(
        options.pop("strategy", "fedavg"),
        2,
        callbacks=[private(method="rdp"), *options.pop("callbacks", ())],
        **options,
    )
    run.fit(module, clients)
    return run


class Words(L.LightningModule):
    def __init__(self, max_norm: float | None) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Embedding(20, NUM_FEATURES, max_norm=max_norm), nn.Flatten(), nn.Linear(3 * NUM_FEATURES, NUM_CLASSES)
        )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def words() -> fl.datamodules.ClientLoaders:
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randint(20, (40, 3), generator=generator), torch.randint(4, (40,), generator=generator))
    return fl.datamodules.ClientLoaders([DataLoader(data, 8)])


class BiasOfTheBatch(Net):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        with torch.no_grad():
            self.net[0].bias[:NUM_FEATURES] = batch[0].mean(0) if len(batch[0]) else 0.0


class BiasInTheStep(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.net[0].bias.data[:NUM_FEATURES] = batch[0].mean(0)
        return super().training_step(batch, batch_idx)


class BiasBeforeTheStep(Net):
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.net[0].bias.data.add_(1.0)


class BiasAfterTheStep(Net):
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        optimizer.step(closure=optimizer_closure)
        self.net[0].bias.data.add_(1.0)


class SkipsByLoss(Net):
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        loss = optimizer_closure()
        if batch_idx % 2 == 0 and loss < 100:
            optimizer.step()


class StopsByLoss(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.trainer.should_stop = bool(loss < 100)
        return loss


class CodeBook(Net):
    """Means of what it has seen, as in vector quantisation, that no optimizer holds."""

    def __init__(self, kind: str = "parameter") -> None:
        super().__init__()
        self.book = nn.Module()
        values = torch.zeros(NUM_CLASSES, NUM_FEATURES, dtype=torch.int64 if kind == "integers" else torch.float32)
        if kind == "parameter":
            self.book.values = nn.Parameter(values)
        else:
            self.book.register_buffer("values", values)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        for label in batch[1].unique():
            self.book.values.data[label] = (100 * batch[0][batch[1] == label].mean(0)).to(self.book.values.dtype)
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.net.parameters(), lr=0.1)


class UnfrozenLater(CodeBook):
    """One that is frozen when training starts."""

    def __init__(self) -> None:
        super().__init__()
        self.book.values.requires_grad = False

    def on_train_epoch_start(self) -> None:
        self.book.values.requires_grad = self.current_epoch > 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) if self.current_epoch else Net.training_step(self, batch, 0)


class BufferInAHook(Net):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(NUM_FEATURES), persistent=False)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.mean += 1.0


@pytest.mark.parametrize(
    ("module", "names"),
    [
        (BiasOfTheBatch(), "net.0.bias was changed between two steps"),
        (BiasInTheStep(), "net.0.bias was changed in training_step"),
        (BiasBeforeTheStep(), "net.0.bias was changed in training_step or a hook"),
        (BiasAfterTheStep(), "net.0.bias was changed between two steps"),
        (SkipsByLoss(), "must take each step"),
        (StopsByLoss(), "EarlyStopping on a validation metric"),
        (BufferInAHook(), "mean was changed between two steps"),
        (CodeBook(), "book.values was changed in training_step"),
        (CodeBook("buffer"), "changed the buffer book.values"),
        (CodeBook("integers"), "changed the buffer book.values"),
        (UnfrozenLater(), "book.values was changed in training_step"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_what_goes_past_the_private_step_stops_the_run(module: L.LightningModule, names: str) -> None:
    with pytest.raises(PrivacyError) as error:
        train(module)
    assert names in str(error.value)


def test_an_embedding_that_renormalises_its_rows_stops_the_run() -> None:
    with pytest.raises(PrivacyError, match=r"no Embedding\(max_norm"):
        train(Words(1.0), words())
    train(Words(None), words())


def test_a_write_after_the_only_step_stops_the_run() -> None:
    data = fl.datamodules.ClientLoaders([DataLoader(examples(), 60)])
    with pytest.raises(PrivacyError, match="after the last step"):
        train(BiasAfterTheStep(), data)


@pytest.mark.parametrize(
    ("hook", "at", "names"),
    [
        ("on_client_start", 0, "net.0.bias was changed between two steps"),
        ("on_train_batch_end", 0, "net.0.bias was changed after the last step"),  # of the first phase
        ("on_next_phase", 0, "net.0.bias was changed between two steps"),
        ("on_train_batch_start", 1, "net.0.bias was changed between two steps"),
        ("on_phase_end", 1, "net.0.bias was changed after the last step"),
    ],
)
@pytest.mark.parametrize("is_first", [True, False])
def test_what_is_written_between_two_phases_stops_the_run(hook: str, at: int, names: str, is_first: bool) -> None:
    strategy = fl.FederatedStrategy(fl.algorithms.FedRep(head_epochs=1), personal=("net.2.*",))
    callbacks = [private(method="rdp"), Writes(hook, at)]
    run = trainer(strategy, 1, callbacks=callbacks[::-1] if is_first else callbacks)
    # One step in each of two phases, of several clients.
    clients = fl.datamodules.ClientLoaders([DataLoader(examples(), 60) for _ in range(2)])
    with pytest.raises(PrivacyError, match=names):
        run.fit(Net(), clients)


class WarmsUp(Net):
    """The example of Lightning's documentation for ``optimizer_step``."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (batch_idx + 1)
        optimizer.step(closure=optimizer_closure)


def test_what_touches_no_example_may_stay() -> None:
    train(WarmsUp())


def test_a_timer_may_end_training() -> None:
    run = train(Net(), callbacks=[Timer({"seconds": 0})])
    assert run.should_stop


@pytest.mark.parametrize("algorithm", ["ditto", "fedrep", "scaffold"])
@pytest.mark.spread(1)
def test_algorithms_that_load_other_models_may(algorithm: str) -> None:
    options = {"personal": ("net.2.*",)} if algorithm == "fedrep" else {}
    train(Net(), strategy=fl.FederatedStrategy(algorithm, **options))
