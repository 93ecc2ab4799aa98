from __future__ import annotations

from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, TensorDataset

from lightning_fl.datamodules import (
    IID,
    ClientLoaders,
    DigitsDataModule,
    Dirichlet,
    FeatureNoise,
    NaturalColumn,
    PartitionedDataModule,
)
from lightning_fl.models import MLPClassifier

PLAIN = SimpleNamespace(strategy=SimpleNamespace())
FEDERATED = SimpleNamespace(strategy=SimpleNamespace(is_federated=True))


class Numbers(L.LightningDataModule):
    """Records the hooks that were called; has no validation data."""

    def __init__(self, **options: object) -> None:
        super().__init__()
        self.options = {"batch_size": 4, **options}
        self.calls: list[object] = []

    def prepare_data(self) -> None:
        self.calls.append("prepare_data")

    def setup(self, stage: str) -> None:
        self.calls.append(("setup", stage))

    def teardown(self, stage: str) -> None:
        self.calls.append(("teardown", stage))

    def train_dataloader(self) -> DataLoader:
        self.loader = DataLoader(TensorDataset(torch.arange(20), torch.arange(20) % 2), **self.options)
        return self.loader

    def test_dataloader(self) -> list[str]:
        return ["the test loader"]

    def state_dict(self) -> dict[str, int]:
        return {"position": 3}

    def on_after_batch_transfer(self, batch: int, dataloader_idx: int) -> int:
        return batch + 1


def samples_of(clients: ClientLoaders) -> list[list[int]]:
    return [sorted(int(number) for x, _ in loader for number in x) for loader in clients.values()]


@pytest.mark.parametrize("attached", [None, FEDERATED])
def test_splits_the_training_data_for_a_federation_and_outside_a_trainer(attached: object) -> None:
    data = PartitionedDataModule(Numbers(), Dirichlet(1.0), num_clients=3, seed=5)
    data.trainer = attached
    clients = data.train_dataloader()
    parts = Dirichlet(1.0)(data.data.loader.dataset, 3, 5)
    assert isinstance(clients, ClientLoaders)
    assert samples_of(clients) == [part.tolist() for part in parts]


def test_any_other_strategy_gets_the_own_loader() -> None:
    data = PartitionedDataModule(Numbers(), IID(), num_clients=3)
    data.trainer = PLAIN
    assert data.train_dataloader() is data.data.loader


@pytest.mark.parametrize(("shuffle", "sampler"), [(True, RandomSampler), (False, SequentialSampler)])
def test_clients_read_in_the_way_of_the_own_loader(shuffle: bool, sampler: type) -> None:
    data = PartitionedDataModule(Numbers(shuffle=shuffle, drop_last=True, batch_size=3), IID(), num_clients=4)
    for loader in data.train_dataloader().values():
        assert isinstance(loader.sampler, sampler)
        assert (loader.batch_size, loader.drop_last, len(loader)) == (3, True, 1)


def test_seed_is_that_of_seed_everything_else_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    def split(seed: int | None) -> list[list[int]]:
        return samples_of(PartitionedDataModule(Numbers(), IID(), num_clients=4, seed=seed).train_dataloader())

    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    assert split(None) == split(0) != split(1)
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    assert split(None) == split(1)


def test_everything_else_is_passed_on() -> None:
    inner = Numbers()
    data = PartitionedDataModule(inner, IID())
    data.trainer = PLAIN
    data.prepare_data()
    data.setup("fit")
    data.teardown("fit")
    assert inner.calls == ["prepare_data", ("setup", "fit"), ("teardown", "fit")]
    assert inner.trainer is PLAIN
    assert data.test_dataloader() == ["the test loader"]
    assert data.state_dict() == {"position": 3}
    assert data.on_after_batch_transfer(1, 0) == 2


def test_what_the_datamodule_does_not_define_is_not_defined() -> None:
    data = PartitionedDataModule(Numbers(), IID())
    assert not is_overridden("val_dataloader", data)
    assert not is_overridden("on_before_batch_transfer", data)
    assert is_overridden("test_dataloader", data)


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ([DataLoader(range(4)), DataLoader(range(4))], "is a list; .* one plain DataLoader"),
        (DataLoader(range(4), batch_sampler=[[0], [1, 2, 3]]), "custom batch_sampler list"),
    ],
)
def test_loaders_that_cannot_be_split_are_refused(loader: object, message: str) -> None:
    inner = Numbers()
    inner.train_dataloader = lambda: loader
    with pytest.raises(ValueError, match=f"{message}.*ClientLoaders"):
        PartitionedDataModule(inner, IID()).train_dataloader()


CONFIG = """
model:
  class_path: MLPClassifier
  init_args:
    hidden: [16]
    lr: 0.2
data:
  class_path: PartitionedDataModule
  init_args:
    data:
      class_path: DigitsDataModule
      init_args:
        batch_size: 16
    partitioner:
      class_path: Dirichlet
      init_args:
        alpha: 0.3
        per: client
    num_clients: 5
trainer:
  accelerator: cpu
  logger: false
  enable_checkpointing: false
"""


def test_is_configured_in_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.yaml").write_text(CONFIG)
    monkeypatch.setattr("sys.argv", ["train", "--config", str(tmp_path / "config.yaml")])
    cli = LightningCLI(subclass_mode_model=True, subclass_mode_data=True, run=False, seed_everything_default=False)
    assert isinstance(cli.datamodule, PartitionedDataModule)
    assert isinstance(cli.datamodule.data, DigitsDataModule)
    assert isinstance(cli.model, MLPClassifier)
    assert cli.datamodule.partitioner == Dirichlet(0.3, per="client")
    cli.datamodule.setup("fit")
    clients = cli.datamodule.train_dataloader()
    assert [loader.batch_size for loader in clients.values()] == [16] * 5
    assert sum(clients.num_examples(client) for client in clients) == 1437


def test_the_same_configuration_is_the_centralised_baseline() -> None:
    data = PartitionedDataModule(DigitsDataModule(), Dirichlet(0.3))
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    L.seed_everything(0, verbose=False)
    trainer.fit(MLPClassifier(), data)
    assert trainer.global_step == 3 * 45
    assert trainer.callback_metrics["val_acc"] > 0.8


def test_clients_keep_a_part_of_their_samples_for_themselves() -> None:
    data = PartitionedDataModule(Numbers(shuffle=True), IID(), num_clients=3, seed=5, val_share=0.25, test_share=0.25)
    whole = samples_of(PartitionedDataModule(Numbers(), IID(), num_clients=3, seed=5).train_dataloader())
    parts = [data.train_dataloader(), data.client_val_dataloaders(), data.client_test_dataloaders()]
    assert [sorted(chain(*client)) for client in zip(*map(samples_of, parts), strict=True)] == whole
    assert isinstance(parts[1][0].sampler, SequentialSampler)
    assert data.test_dataloader() == ["the test loader"]
    validated = sorted(int(number) for x, _ in data.val_dataloader() for number in x)
    assert validated == sorted(chain(*samples_of(parts[1])))
    data.trainer = PLAIN
    pooled = data.train_dataloader()
    assert isinstance(pooled.sampler, RandomSampler)
    trained = sorted(int(number) for x, _ in pooled for number in x)
    assert trained == sorted(chain(*samples_of(parts[0])))


def test_the_baseline_sees_the_noise_that_clients_see() -> None:
    inner = Numbers()
    inner.train_dataloader = lambda: DataLoader(TensorDataset(torch.zeros(20, 3), torch.arange(20)), batch_size=20)
    data = PartitionedDataModule(inner, FeatureNoise(1.0), num_clients=2)
    noisy = {
        int(label): x
        for loader in data.train_dataloader().values()
        for xs, ys in loader
        for x, label in zip(xs, ys, strict=True)
    }
    data.trainer = PLAIN
    for xs, ys in data.train_dataloader():
        assert all(torch.equal(x, noisy[int(label)]) for x, label in zip(xs, ys, strict=True))


def test_clients_that_the_data_names() -> None:
    inner = Numbers()
    inner.train_dataloader = lambda: DataLoader(TensorDataset(torch.arange(20), torch.arange(20) % 3))
    clients = PartitionedDataModule(inner, NaturalColumn(1)).train_dataloader()
    assert list(clients) == [0, 1, 2]


def test_a_part_that_clients_do_not_keep_is_refused() -> None:
    with pytest.raises(ValueError, match="The clients have no val data; set val_share"):
        PartitionedDataModule(Numbers(), IID()).client_val_dataloaders()
    with pytest.raises(ValueError, match="sum to less than 1"):
        PartitionedDataModule(Numbers(), IID(), val_share=0.5, test_share=0.5)


def test_loader_options_replace_those_of_the_loader() -> None:
    inner = Numbers()
    inner.train_dataloader = lambda: DataLoader(range(40), batch_sampler=[[0], [1, 2, 3]])
    options = {"batch_sampler": lambda dataset: BatchSampler(range(len(dataset)), 3, drop_last=True), "timeout": 0}
    data = PartitionedDataModule(inner, IID(), num_clients=4, **options)
    clients = data.train_dataloader()
    for client in clients:
        assert [len(batch) for batch in clients[client]] == [3, 3, 3]
    data.trainer = PLAIN
    assert [len(batch) for batch in data.train_dataloader()] == [3] * 13
