"""Parties that hold other columns train the network that one owner of all columns would."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from sklearn.datasets import load_breast_cancer
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_fl.communication import Group, Message
from lightning_fl.vertical import GradientNoise, Party, PartyLost, SharedOrder, VerticalStrategy, aligned_loader
from lightning_fl.vertical.channel import Channel
from tests.contract.helpers import run_threads
from tests.helpers.distributed import PATIENCE

WIDTH, EPOCHS, BATCH, ROWS = 8, 3, 64, 569


def data() -> tuple[Tensor, Tensor]:
    x, y = load_breast_cancer(return_X_y=True)
    return torch.from_numpy(StandardScaler().fit_transform(x)), torch.from_numpy(y)


def columns(parties: int) -> list[slice]:
    size = 30 // parties
    return [slice(party * size, (party + 1) * size) for party in range(parties)]


def bottom(party: int, width: int) -> nn.Module:
    torch.manual_seed(party)
    return nn.Sequential(nn.Linear(width, WIDTH, dtype=torch.float64), nn.Tanh())


def top(parties: int) -> nn.Module:
    torch.manual_seed(100)
    return nn.Linear(parties * WIDTH, 2, dtype=torch.float64)


def optimizer(name: str, module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), 0.5) if name == "sgd" else torch.optim.Adam(module.parameters(), 0.01)


class Part(Party):
    """A party's part; the one with the labels has the upper layer too."""

    def __init__(self, party: int, parties: int, has_labels: bool, name: str) -> None:
        super().__init__()
        size = 30 // parties
        self.bottom = bottom(party, size)
        self.top = top(parties) if has_labels else None
        self.optimizer_name = name
        self.seen: list[Tensor] = []

    def step(self, batch: Sequence[Tensor], name: str) -> Tensor:
        parts = self.exchange(self.bottom(batch[0]))
        if not self.has_labels:
            return parts
        logits = self.top(torch.cat(parts, 1))
        loss = functional.cross_entropy(logits, batch[1])
        self.log(name, loss, on_step=False, on_epoch=True, prog_bar=False)
        self.log(f"{name}_acc", (logits.argmax(1) == batch[1]).double().mean(), on_step=False, on_epoch=True)
        return loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.step(batch, "train")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.step(batch, "val")

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        parts = self.exchange(self.bottom(batch[0]))
        return self.top(torch.cat(parts, 1)) if self.has_labels else None

    def configure_optimizers(self) -> Any:
        return optimizer(self.optimizer_name, self)


class Whole(L.LightningModule):
    """The centralised network."""

    def __init__(self, parties: int, name: str) -> None:
        super().__init__()
        self.slices = columns(parties)
        self.bottoms = nn.ModuleList(bottom(party, 30 // parties) for party in range(parties))
        self.top = top(parties)
        self.optimizer_name = name

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        parts = [part(x[:, own]) for part, own in zip(self.bottoms, self.slices, strict=True)]
        return functional.cross_entropy(self.top(torch.cat(parts, 1)), y)

    def configure_optimizers(self) -> Any:
        return optimizer(self.optimizer_name, self)


def loader(tensors: Sequence[Tensor], shuffle: bool = True, ids: Sequence[int] = range(ROWS)) -> DataLoader:
    return aligned_loader(TensorDataset(*tensors), ids, BATCH, shuffle=shuffle, seed=3)


QUIET = {
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accelerator": "cpu",
    "num_sanity_val_steps": 0,
}


def trained(parties: int, name: str, options: dict[str, Any], labels: int = 0, folder: str | None = None) -> Any:
    """Trains this rank's part; what it has then, and the bytes that it has exchanged."""
    rank = int(os.environ["RANK"])
    x, y = data()
    strategy = VerticalStrategy(labels=labels, name=f"clinic {rank}")
    part = Part(rank, parties, rank == labels, name)
    tensors = [x[:, columns(parties)[rank]], *([y] if rank == labels else [])]
    checkpoints = {"enable_checkpointing": False} if folder is None else {"default_root_dir": folder}
    trainer = L.Trainer(strategy=strategy, **{**QUIET, "max_epochs": EPOCHS, **checkpoints, **options})
    trainer.fit(part, loader(tensors), loader(tensors, shuffle=False))
    channel = strategy.channel
    return {
        "state": part.state_dict(),
        "sent": dict(channel.sent),
        "received": dict(channel.received),
        "metrics": {key: float(value) for key, value in trainer.callback_metrics.items()},
    }


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped": {"gradient_clip_val": 0.05},
    "accumulated": {"accumulate_grad_batches": 2},
}


@pytest.mark.parametrize(
    ("parties", "name", "option", "labels"),
    [
        (2, "adam", "plain", 0),
        (2, "sgd", "clipped", 1),
        pytest.param(3, "adam", "clipped", 0, marks=pytest.mark.slow),
        pytest.param(3, "sgd", "plain", 2, marks=pytest.mark.slow),
        pytest.param(2, "sgd", "accumulated", 0, marks=pytest.mark.slow),
    ],
)
@pytest.mark.spread(1)
def test_it_trains_what_one_owner_would(run_ranks: Any, parties: int, name: str, option: str, labels: int) -> None:
    found = run_ranks(parties, trained, parties, name, OPTIONS[option], labels)
    whole = Whole(parties, name)
    initial = {key: value.clone() for key, value in whole.state_dict().items()}
    trainer = L.Trainer(**{**QUIET, "max_epochs": EPOCHS, "enable_checkpointing": False, **OPTIONS[option]})
    trainer.fit(whole, loader(data()))
    for party, told in enumerate(found):
        expected = whole.bottoms[party].state_dict()
        for key, value in expected.items():
            torch.testing.assert_close(told["state"][f"bottom.{key}"], value, rtol=1e-12, atol=1e-12)
            assert not torch.equal(value, initial[f"bottoms.{party}.{key}"])
    torch.testing.assert_close(found[labels]["state"]["top.weight"], whole.top.weight.data, rtol=1e-12, atol=1e-12)
    assert found[labels]["metrics"]["val_acc"] > 0.9
    # Activations in training and validation, gradients in training alone.
    one_pass = ROWS * WIDTH * 8 * EPOCHS
    for party, told in enumerate(found):
        if party != labels:
            assert (told["sent"], told["received"]) == ({labels: 2 * one_pass}, {labels: one_pass})


# ---- checkpoints


def stop_and_go_on(folder: str) -> Any:
    straight = trained(2, "adam", {"max_epochs": 4})
    trained(2, "adam", {"max_epochs": 2}, folder=folder)
    path = Path(folder) / "checkpoints" / f"epoch=1-step={2 * -(-ROWS // BATCH)}.ckpt"
    rank, (x, y) = int(os.environ["RANK"]), data()
    part = Part(rank, 2, rank == 0, "adam")
    tensors = [x[:, columns(2)[rank]], *([y] if rank == 0 else [])]
    trainer = L.Trainer(strategy=VerticalStrategy(), **{**QUIET, "max_epochs": 4, "enable_checkpointing": False})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`")  # this one saves nothing
        trainer.fit(part, loader(tensors), loader(tensors, shuffle=False), ckpt_path=str(path))
    answers = trainer.predict(part, loader(tensors, shuffle=False))
    same = all(torch.equal(value, straight["state"][key]) for key, value in part.state_dict().items())
    return same, [path.name for path in Path(folder).rglob("*.ckpt")], None if rank else torch.cat(answers)


def test_stopping_and_going_on_changes_no_bit(run_ranks: Any, tmp_path: Path) -> None:
    first, second = run_ranks(2, stop_and_go_on, str(tmp_path))
    assert first[0]
    assert second[0]
    assert sorted(name.startswith("party1-") for name in first[1]) == [False, True]
    assert (first[2].argmax(1) == data()[1]).double().mean() > 0.9


# ---- refusals


def mismatched(what: str) -> str:
    rank, (x, y) = int(os.environ["RANK"]), data()
    tensors, ids, options = [x[:, columns(2)[rank]], *([] if rank else [y])], list(range(ROWS)), {}
    protection = None
    if what.startswith("protected"):
        protection = None if rank else GradientNoise()
        options = {"gradient_clip_val": 1.0, "gradient_clip_algorithm": what.rpartition(" ")[2]}
    if rank and what == "order":
        ids[0], ids[1] = ids[1], ids[0]
    elif rank and what == "row":
        tensors, ids = [tensors[0][:-1]], ids[:-1]
    elif rank and what == "clip":
        options = {"gradient_clip_val": 1.0}
    strategy = VerticalStrategy(protection=protection)
    trainer = L.Trainer(strategy=strategy, max_epochs=1, enable_checkpointing=False, **QUIET, **options)
    train = DataLoader(TensorDataset(*tensors), BATCH, shuffle=True) if what == "loader" else loader(tensors, True, ids)
    try:
        trainer.fit(Part(rank, 2, rank == 0, "sgd"), train, loader(tensors, False, ids))
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("order", "are in a different order"),
        ("row", "has rows="),
        ("clip", "has gradient_clip_val="),
        ("loader", "aligned_loader"),
        ("protected clipping by norm", "reveal the norm of its gradients"),
        ("protected clipping by value", ""),
    ],
)
@pytest.mark.spread(2)
def test_parties_that_do_not_fit_are_refused(run_ranks: Any, what: str, message: str) -> None:
    found = run_ranks(2, mismatched, what)
    assert all(message in told if message else not told for told in found), found


def test_one_party_is_refused() -> None:
    trainer = L.Trainer(strategy=VerticalStrategy(), max_epochs=1, enable_checkpointing=False, **QUIET)
    with pytest.raises(ValueError, match="at least two parties"):
        trainer.fit(Part(0, 2, True, "sgd"), loader(data()), loader(data()))


def test_a_party_that_is_lost_is_named_to_all() -> None:
    def check(group: Group) -> str:
        channel = Channel(group, ["hospital", "laboratory", "insurer"])
        if group.rank == 2:
            return ""  # its end of the connection closes with it
        try:
            if group.rank == 0:
                channel.receive(1, (1, 1))
                channel.receive(2, (1, 1))
            else:
                channel.send(torch.zeros(1, 1), 0)
                channel.receive(0, (1, 1))
        except PartyLost as error:
            return str(error)
        return ""

    found = run_threads(3, check, timeout=3)
    assert all("Party 2 (insurer) has left" in told for told in found[:2])


TRAINS = """
import sys, time
from pathlib import Path
from tests.vertical.test_training import trained
import tests.vertical.test_training as own

def slow(self, batch, batch_idx, step=own.Part.training_step):
    if batch_idx == 3:
        Path(f"party{sys.argv[1]}").touch()
        time.sleep(0.2)
    return step(self, batch, batch_idx)

own.Part.training_step = slow
trained(3, "sgd", {"max_epochs": 1000})
"""


@pytest.mark.slow
def test_a_party_that_is_killed_ends_the_others_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "trains.py").write_text(TRAINS)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    root = str(Path(__file__).parents[2])
    shared = {**os.environ, "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": root}
    parties = [
        subprocess.Popen(
            [sys.executable, "trains.py", str(rank)],
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=tmp_path,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    try:
        end = time.monotonic() + PATIENCE
        while not all((tmp_path / f"party{rank}").exists() for rank in range(3)):
            assert time.monotonic() < end
            assert all(party.poll() is None for party in parties)
            time.sleep(0.1)
        parties[1].kill()
        for rank in (0, 2):
            _, told = parties[rank].communicate(timeout=PATIENCE)
            assert "Party 1 (clinic 1) has left" in told, f"{rank}: {told[-5000:]}"
            assert parties[rank].returncode
    finally:
        for party in parties:
            party.kill()
            party.communicate()


@pytest.mark.parametrize(
    ("sent", "shape", "message"),
    [
        (torch.zeros(2, 3), (2, 4), "expected \\[2, 4\\]"),
        (torch.zeros(2, 3).double(), (2, 3), "expected torch.float32"),
        (torch.zeros(2, 3, 1), (2, 3), "sent a tensor of shape"),
    ],
)
def test_other_tensors_are_refused(sent: Tensor, shape: tuple[int, ...], message: str) -> None:
    def check(group: Group) -> None:
        channel = Channel(group, ["", ""])
        if group.rank:
            with suppress(PartyLost):  # the other one refuses, and is gone before all has been sent
                channel.send(sent, 0)
        else:
            with pytest.raises(ValueError, match=message):
                channel.receive(1, shape, torch.float32)

    run_threads(2, check)


def test_a_size_that_overflows_is_refused() -> None:
    def check(group: Group) -> None:
        if group.rank:
            group.send(torch.tensor([0, 1, 2, 2, 32, 1 << 59, 0, 0, 0, 0]), 0)  # 2^64 elements
        else:
            with pytest.raises(ValueError, match="sent a tensor of shape"):
                Channel(group, ["", ""]).receive(1, (32, None))

    run_threads(2, check)


def holds(received: Tensor, secret: Tensor) -> bool:
    """Whether a column of what was received is one of the secret columns."""
    return any(torch.allclose(a, b) for a in received.T for b in secret.T)


def test_only_activations_and_gradients_travel(run_ranks: Any) -> None:
    activations, gradients = (torch.cat(tensors) for tensors in run_ranks(2, spied))
    x, y = data()
    assert activations.shape == (2 * ROWS, WIDTH)  # of training and validation
    assert gradients.shape == (ROWS, WIDTH)
    own, drawn = x[:, columns(2)[1]], y[list(SharedOrder(range(ROWS), 3, shuffle=True))].double()[:, None]
    assert not holds(activations[ROWS:], own)
    assert not holds(gradients, drawn)
    assert holds(torch.cat([activations[ROWS:], own], 1), own)  # the negative control


def spied() -> list[Tensor]:
    received: list[Tensor] = []
    receive = Channel.receive

    def spy(self: Channel, *args: Any) -> Tensor:
        received.append(receive(self, *args))
        return received[-1].clone()

    Channel.receive = spy  # type: ignore[method-assign]
    try:
        trained(2, "sgd", {"max_epochs": 1})
    finally:
        Channel.receive = receive  # type: ignore[method-assign]
    return [tensor.detach() for tensor in received]


def test_a_message_can_still_be_gathered(run_ranks: Any) -> None:
    def check(group: Group) -> int:
        if group.rank:
            group.send(torch.arange(3), 0)
        else:
            assert group.receive(torch.empty(3, dtype=torch.int64), 1).tolist() == [0, 1, 2]
        return len(group.all_gather(Message()))

    assert run_threads(2, check) == [2, 2]


class Ends(Party):
    """The first and last layers, with the labels."""

    def __init__(self) -> None:
        super().__init__()
        self.bottom, self.head = bottom(0, 30), bottom(2, WIDTH)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return functional.cross_entropy(self.head(self.remote(self.bottom(batch[0]), server=1)), batch[1])

    def configure_optimizers(self) -> Any:
        return optimizer("sgd", self)


class Middle(Party):
    """The layers between."""

    def __init__(self) -> None:
        super().__init__()
        self.middle = bottom(1, WIDTH)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.serve(self.middle, client=0)

    def configure_optimizers(self) -> Any:
        return optimizer("sgd", self)


class Chain(L.LightningModule):
    """Both in one."""

    def __init__(self) -> None:
        super().__init__()
        self.bottom, self.middle, self.head = bottom(0, 30), bottom(1, WIDTH), bottom(2, WIDTH)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return functional.cross_entropy(self.head(self.middle(self.bottom(batch[0]))), batch[1])

    def configure_optimizers(self) -> Any:
        return optimizer("sgd", self)


def u_shaped(accumulate: int) -> dict[str, Tensor]:
    rank = int(os.environ["RANK"])
    part: Party = Middle() if rank else Ends()
    options = {**QUIET, "max_epochs": 2, "enable_checkpointing": False, "accumulate_grad_batches": accumulate}
    rows = loader([torch.zeros(ROWS, 1)]) if rank else loader(data())
    L.Trainer(strategy=VerticalStrategy(), **options).fit(part, rows)
    return part.state_dict()


@pytest.mark.parametrize("accumulate", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_u_shaped_split_trains_what_one_owner_would(run_ranks: Any, accumulate: int) -> None:
    ends, middle = run_ranks(2, u_shaped, accumulate)
    whole = Chain()
    options = {**QUIET, "max_epochs": 2, "enable_checkpointing": False, "accumulate_grad_batches": accumulate}
    L.Trainer(**options).fit(whole, loader(data()))
    found = {**ends, **middle}
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12)


class Spy:
    """A channel that notes what is sent, and answers with ones."""

    def __init__(self) -> None:
        self.sent: list[Tensor] = []

    def send(self, tensor: Tensor, to: int) -> None:
        self.sent.append(tensor.clone())

    def receive(self, source: int, shape: tuple[int | None, ...], dtype: torch.dtype | None = None) -> Tensor:
        return torch.ones(6, 3)


@pytest.mark.parametrize("protection", [None, GradientNoise()])
def test_the_middle_gets_gradients_with_noise_too(protection: GradientNoise | None) -> None:
    spy = Spy()

    class Spied(Ends):
        vertical = SimpleNamespace(has_labels=True, protection=protection, channel=spy)

    h = torch.ones(6, 3, requires_grad=True)
    (2 * Spied().remote(h, server=1)).sum().backward()
    activations, gradient = spy.sent
    assert torch.equal(activations, torch.ones(6, 3))
    assert torch.equal(gradient, torch.full((6, 3), 2.0)) is (protection is None)
