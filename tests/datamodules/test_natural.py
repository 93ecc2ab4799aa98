"""Every data set that belongs to clients by nature, through the smallest one."""

from __future__ import annotations

from types import SimpleNamespace

import lightning as L
import pytest
import torch
from torch.utils.data import Dataset, TensorDataset

from lightning_fl.datamodules import ClientData, ClientLoaders, NaturalDataModule
from lightning_fl.models import MLPClassifier

PLAIN = SimpleNamespace(strategy=SimpleNamespace())
SIZES = {"ann": 10, "bob": 1, "eve": 5}


class People(NaturalDataModule):
    """Samples are pairs of a number, unique among all clients, and a label."""

    def __init__(self, with_test: bool = False, **options: object) -> None:
        super().__init__(**{"batch_size": 4, **options})
        self.with_test = with_test
        self.opened: list[str] = []

    def read(self) -> ClientData:
        test = ClientData(["bob", "zoe"], lambda client: 2, lambda client: self._numbers(100 + len(client), 2))
        return ClientData(list(SIZES), SIZES.__getitem__, self._open, test if self.with_test else None)

    def _open(self, client: str) -> Dataset:
        self.opened.append(client)
        return self._numbers({"ann": 0, "bob": 10, "eve": 11}[client], SIZES[client])

    def _numbers(self, start: int, number: int) -> Dataset:
        values = torch.arange(start, start + number)
        return TensorDataset(values.float().unsqueeze(1), values % 2)


def numbers(loader: object) -> list[int]:
    return [int(number) for x, _ in loader for number in x]  # type: ignore[attr-defined]


def together(clients: ClientLoaders) -> list[int]:
    return [number for loader in clients.values() for number in numbers(loader)]


def test_each_client_keeps_its_own_validation_and_test_data() -> None:
    data = People(val_share=0.2, test_share=0.3)
    train, val, test = data.train_dataloader(), data.client_val_dataloaders(), data.client_test_dataloaders()
    assert isinstance(train, ClientLoaders)
    for client, size in SIZES.items():
        parts = [numbers(loaders[client]) for loaders in (train, val, test)]
        assert [len(part) for part in parts] == [loaders.num_examples(client) for loaders in (train, val, test)]
        assert len({*parts[0], *parts[1], *parts[2]}) == sum(map(len, parts)) == size
    assert [train.num_examples(client) for client in SIZES] == [5, 1, 2]
    assert sorted(numbers(data.val_dataloader())) == sorted(together(val))
    assert sorted(numbers(data.test_dataloader())) == sorted(together(test))


def test_clients_are_opened_only_when_they_are_asked_for() -> None:
    data = People(test_share=0.0)
    loaders = data.train_dataloader()
    assert sum(map(loaders.num_examples, loaders)) == 16
    assert data.opened == []
    numbers(loaders["eve"])
    assert data.opened == ["eve"]


def test_any_other_strategy_gets_all_training_data_in_one_loader() -> None:
    data = People(test_share=0.2)
    clients = data.train_dataloader()
    data.trainer = PLAIN
    assert sorted(numbers(data.train_dataloader())) == sorted(together(clients))
    assert numbers(data.train_dataloader()) != numbers(data.train_dataloader())
    assert data.val_dataloader().batch_size == 256


def test_test_data_of_the_source_is_taken_as_it_is() -> None:
    data = People(with_test=True, val_share=0.2)
    assert list(data.client_test_dataloaders()) == ["bob", "zoe"]
    assert numbers(data.test_dataloader()) == [103, 104, 103, 104]
    assert sum(len(numbers(loader)) for loader in data.train_dataloader().values()) == 16 - 2 - 1


def test_without_validation_data_a_trainer_validates_nothing() -> None:
    data = People(test_share=0.0)
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        strategy="fedavg",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with pytest.warns(match="have no `val_dataloader`"):
        trainer.fit(MLPClassifier(1, (), 2, lr=1e-3), data)
    assert "val_loss" not in trainer.callback_metrics
    with pytest.raises(ValueError, match="have no test data; set test_share"):
        data.client_test_dataloaders()


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"eval_batch_size": 0}, {"val_share": 0.6, "test_share": 0.4}])
def test_arguments_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be at least"):
        People(**options)
