"""Non-interference: of an example that differs, nothing leaves a silo but the noised update and the logged metrics.

A federation of three silos trains twice, with the same draws and noise; the data of one silo differ in one example, for
training and for validation. All messages, files, calls of loggers and warnings of the two runs are compared.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_fl as fl
from lightning_fl.communication import Message
from lightning_fl.communication.group import TorchGroup
from lightning_fl.privacy.secagg.keys import KeyFolder
from tests.helpers.training import images
from tests.trainer.ranks.test_hooks_and_callbacks import rank

RunRanks = Callable[..., list[Any]]
NUM_SILOS, WITH_NEIGHBOUR = 3, 2
SECRET = "patient 4711 has no diagnosis"
METRICS = ("train_loss", "val_loss", "round/train_loss", "round/val_loss")
FUNCTIONS_OF_THE_UPDATE = ("squared_norm", "update_norm", "update_spread", "fl/update_norm", "fl/update_spread")
CLOCKS = ("seconds", "time", "started", "directory", "num_bytes", "fl/num_bytes", "command")
FRESH_IN_EACH_RUN = ("nonce", "adverts", "folder")
ENTRIES_OF_A_METRIC = ("/value", "/weight", "/current_score", "/best_model_score")


class Net(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(16, 4))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class SpyLogger(Logger):
    """Keeps every call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []

    name, version = "spy", 0

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.calls.append(["metrics", dict(metrics), step])

    def log_hyperparams(self, params: Any, *_: Any, **__: Any) -> None:
        self.calls.append(["hyperparams", {name: str(value) for name, value in dict(params).items()}])


class Whistleblower(fl.callbacks.FederatedCallback):
    """The control: tells the others a hash of the data."""

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self.hash = sha256(batch[0].numpy().tobytes()).hexdigest()

    def on_aggregate_end(self, trainer: Any, module: Any, aggregate: Any, view: Any) -> None:
        view.group.all_gather(Message({"hash": self.hash}), "hash")


class Unreadable(TensorDataset):
    def __getitem__(self, index: int) -> Any:
        raise ValueError(f"row {index}: {SECRET}")


def dataset(num_examples: int, seed: int, neighbour: str) -> TensorDataset:
    """The first example differs in a neighbouring data set."""
    x, y = (tensor.clone() for tensor in images(num_examples, seed).tensors)
    if neighbour and rank() == WITH_NEIGHBOUR:
        if neighbour == "unreadable":
            return Unreadable(x, y)
        x[0] = torch.nan if neighbour == "nan" else x[0] + 3.0
        y[0] = (y[0] + 1) % 4
    return TensorDataset(x, y)


def described(value: Any) -> Any:
    """A value as JSON, of tensors only the shape: which noised values they hold differs."""
    if isinstance(value, Tensor):
        return ["tensor", list(value.shape), str(value.dtype)]
    if isinstance(value, dict):
        return {str(name): described(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [described(item) for item in value]
    if isinstance(value, str) and value.startswith("{"):
        return json.loads(value)
    return value if isinstance(value, int | float | str | bool | None) else str(type(value))


def observe(scenario: str, keys: str, folder: str, neighbour: str) -> dict[str, Any]:
    """What the others see of this silo: its messages, files, logged values and warnings."""
    messages: list[Any] = []
    originals = {name: getattr(TorchGroup, name) for name in ("all_gather", "all_reduce", "broadcast")}

    def all_gather(group: TorchGroup, message: Message, topic: str = "") -> list[Message]:
        messages.append([topic, described(json.loads(json.dumps(message.fields))), described(message.tensors)])
        return originals["all_gather"](group, message, topic)

    def all_reduce(group: TorchGroup, tensor: Tensor, op: str = "sum") -> Tensor:
        messages.append(["all_reduce", described(tensor), op])
        return originals["all_reduce"](group, tensor, op)

    def broadcast(group: TorchGroup, tensor: Tensor, root: int = 0) -> Tensor:
        messages.append(["broadcast", sha256(tensor.numpy().tobytes()).hexdigest()])
        return originals["broadcast"](group, tensor, root)

    logger = SpyLogger()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for name, spy in (("all_gather", all_gather), ("all_reduce", all_reduce), ("broadcast", broadcast)):
            setattr(TorchGroup, name, spy)
        try:
            make_trainer(scenario, keys, folder, logger).fit(
                Net(),
                DataLoader(dataset(12, rank(), neighbour), batch_size=6),
                DataLoader(dataset(6, 10 + rank(), neighbour.replace("unreadable", "")), batch_size=3),
            )
        finally:
            for name, original in originals.items():
                setattr(TorchGroup, name, original)
    files = {str(path.relative_to(folder)): read(path) for path in sorted(Path(folder).rglob("*")) if path.is_file()}
    seen = {
        "messages": messages,
        "files": files if rank() == 0 else {},
        "logger": described(logger.calls),
        # What a silo warns itself of stays there.
        "warnings": [str(warning.message) for warning in caught if rank() != WITH_NEIGHBOUR],
    }
    return dict(json.loads(json.dumps(seen).replace(folder, "")))


def make_trainer(scenario: str, keys: str, folder: str, logger: Logger) -> L.Trainer:
    options: dict[str, Any] = {"weighting": "uniform"}
    callbacks = [fl.callbacks.RunRecord(Path(folder, "record")), ModelCheckpoint(Path(folder, "ckpt"), save_last=True)]
    if "examples" in scenario:
        callbacks.append(fl.callbacks.SampleLevelDP(noise_multiplier=1.0, insecure_test_seed=1))
    if "clients" in scenario:
        options["transforms"] = [
            fl.privacy.ClientLevelDP(clip=0.1, noise_multiplier=1.0, mode="local", insecure_test_seed=1)
        ]
    if "distributed" in scenario:
        options["transforms"] = [
            fl.privacy.ClientLevelDP(clip=0.1, noise_multiplier=1.0, mode="distributed", insecure_test_seed=1)
        ]
    if "sum" in scenario or "distributed" in scenario:
        options["aggregator"] = fl.privacy.SecureAggregation(keys=keys)
    if "control" in scenario:
        callbacks.append(Whistleblower())
    return L.Trainer(
        strategy=fl.FederatedStrategy("fedavg", seed=0, on_client_error="skip", **options),
        accelerator="cpu",
        max_epochs=2,
        logger=logger,
        callbacks=callbacks,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def read(path: Path) -> Any:
    if path.suffix == ".ckpt":
        return described(torch.load(path, weights_only=True))
    if path.suffix in (".json", ".jsonl"):
        return [json.loads(line) for line in path.read_text().replace("\n ", " ").replace("\n}", "}").splitlines()]
    return path.stat().st_size


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """The places where two observations differ, without those that may."""
    if isinstance(one, dict) and isinstance(other, dict):
        names = [*one, *(name for name in other if name not in one)]
        allowed = (*METRICS, *FUNCTIONS_OF_THE_UPDATE, *CLOCKS, *FRESH_IN_EACH_RUN)
        return [
            found
            for name in names
            if name not in allowed and not name.startswith("fl/seconds")
            for found in differences(one.get(name), other.get(name), f"{where}/{name}")
        ]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return [
            found
            for index, (a, b) in enumerate(zip(one, other, strict=True))
            for found in differences(a, b, f"{where}/{index}")
        ]
    is_metric = where.endswith(ENTRIES_OF_A_METRIC) or "metrics/training_step." in where
    if is_metric or one == other or (one != one and other != other):
        return []
    return [f"{where}: {one!r} and {other!r}"]


@pytest.fixture
def keys(tmp_path: Path) -> str:
    folders = [KeyFolder(tmp_path / f"silo{number}") for number in range(NUM_SILOS)]
    public = [folder.create() for folder in folders]
    for folder in folders:
        folder.trust(public)
    return str(tmp_path / "silo{rank}")


def neighbouring(run_ranks: RunRanks, scenario: str, keys: str, folder: Path, neighbour: str) -> list[str]:
    runs = [
        run_ranks(NUM_SILOS, observe, scenario, keys, str(folder / f"run{len(own)}"), own) for own in ("", neighbour)
    ]
    return [
        found
        for number, (one, other) in enumerate(zip(*runs, strict=True))
        for found in differences(one, other, f"rank {number}")
    ]


@pytest.mark.parametrize(
    ("scenario", "neighbour"),
    [
        ("examples", "moved"),
        pytest.param("examples", "nan", marks=pytest.mark.slow),
        pytest.param("clients", "moved", marks=pytest.mark.slow),
        ("clients", "nan"),
        pytest.param("examples in a secure sum", "moved", marks=pytest.mark.slow),
        pytest.param("examples in a secure sum", "nan", marks=pytest.mark.slow),
        pytest.param("distributed noise", "moved", marks=pytest.mark.slow),
        pytest.param("distributed noise", "nan", marks=pytest.mark.slow),
        # A secure sum alone is not differentially private: that an update is not finite shows.
        pytest.param("secure sum", "moved", marks=pytest.mark.slow),
    ],
)
@pytest.mark.spread(1)
def test_one_example_changes_nothing_but_the_update_and_the_metrics(
    run_ranks: RunRanks, keys: str, tmp_path: Path, scenario: str, neighbour: str
) -> None:
    assert neighbouring(run_ranks, scenario, keys, tmp_path, neighbour) == []


def test_a_hash_of_the_data_is_found(run_ranks: RunRanks, keys: str, tmp_path: Path) -> None:
    found = neighbouring(run_ranks, "examples with a control", keys, tmp_path, "moved")
    assert found
    assert all("rank 2/messages" in place and "/hash" in place for place in found)


@pytest.mark.parametrize(
    "scenario", ["nobody is protected", "clients", pytest.param("examples", marks=pytest.mark.slow)]
)
def test_the_text_of_an_error_stays_in_its_silo(run_ranks: RunRanks, keys: str, tmp_path: Path, scenario: str) -> None:
    seen = run_ranks(NUM_SILOS, observe, scenario, keys, str(tmp_path / "run"), "unreadable")
    assert (SECRET in json.dumps(seen)) == (scenario == "nobody is protected")
    assert all(f"client {WITH_NEIGHBOUR}" in " ".join(own["warnings"]) for own in seen[:1])
