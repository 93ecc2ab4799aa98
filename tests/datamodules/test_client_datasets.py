from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from lightning_fl.data.client_loaders import count_examples
from lightning_fl.datamodules import ClientDatasets, ClientLoaders
from lightning_fl.models import MLPClassifier


def numbers(*values: int) -> TensorDataset:
    return TensorDataset(torch.tensor(values))


def numbers_of(loader: DataLoader) -> list[int]:
    return [int(number) for (batch,) in loader for number in batch]


def trainer(is_federated: bool | None) -> SimpleNamespace:
    return SimpleNamespace(
        strategy=SimpleNamespace() if is_federated is None else SimpleNamespace(is_federated=is_federated)
    )


@pytest.mark.parametrize("attached", [None, trainer(True)])
def test_gives_client_loaders_to_a_federation_and_outside_a_trainer(attached: object) -> None:
    data = ClientDatasets([numbers(1, 2, 3), numbers(4)], batch_size=2, shuffle=False)
    data.trainer = attached
    clients = data.train_dataloader()
    assert isinstance(clients, ClientLoaders)
    assert [[batch.tolist() for (batch,) in clients[client]] for client in (0, 1)] == [[[1, 2], [3]], [[4]]]


@pytest.mark.parametrize("attached", [trainer(False), trainer(None)])
def test_gives_one_pooled_loader_to_any_other_strategy(attached: object) -> None:
    data = ClientDatasets({"a": numbers(1, 2, 3), "b": lambda: numbers(4)}, batch_size=3)
    data.trainer = attached
    loader = data.train_dataloader()
    assert isinstance(loader, DataLoader)
    assert isinstance(loader.sampler, RandomSampler)
    assert loader.batch_size == 3
    assert sorted(numbers_of(loader)) == [1, 2, 3, 4]


def test_a_mapping_names_the_clients() -> None:
    clients = ClientDatasets({"north": numbers(1), 7: numbers(2)}).train_dataloader()
    assert list(clients) == ["north", 7]
    assert numbers_of(clients["north"]) == [1]


def test_functions_open_a_client_only_when_it_is_needed() -> None:
    opened = []

    def opener(client: int):
        return lambda: opened.append(client) or numbers(client)

    clients = ClientDatasets({client: opener(client) for client in range(1000)}).train_dataloader()
    assert opened == []
    assert numbers_of(clients[5]) == [5]
    assert opened == [5]


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("batch_size", [1, 2, 4, None])
def test_num_examples_is_what_one_pass_yields(batch_size: int | None, drop_last: bool) -> None:
    train = [numbers(1, 2, 3), numbers(1, 2, 3, 4, 5), numbers()]
    clients = ClientDatasets(train, batch_size=batch_size, drop_last=drop_last).train_dataloader()
    for client, loader in clients.items():
        assert clients.num_examples(client) == len(numbers_of(loader))


def test_batch_size_none_makes_one_batch_of_each_client_and_set() -> None:
    data = ClientDatasets([numbers(1, 2, 3), numbers(4)], val=[numbers(5), numbers(6, 7)], batch_size=None)
    clients = data.train_dataloader()
    assert [len(loader) for loader in clients.values()] == [1, 1]
    assert [batch.tolist() for (batch,) in data.val_dataloader()] == [[5, 6, 7]]
    data.trainer = trainer(False)
    assert len(data.train_dataloader()) == 1


def test_shuffle_is_for_training_only() -> None:
    data = ClientDatasets([numbers(1, 2)], val=numbers(3), test=numbers(4))
    assert isinstance(data.train_dataloader()[0].sampler, RandomSampler)
    assert isinstance(data.val_dataloader().sampler, SequentialSampler)
    assert isinstance(data.test_dataloader().sampler, SequentialSampler)


@pytest.mark.parametrize("batch_size", [2, None])
def test_a_client_without_data_has_an_empty_loader(batch_size: int | None) -> None:
    clients = ClientDatasets([numbers(1), numbers()], batch_size=batch_size).train_dataloader()
    assert len(clients[1]) == 0
    assert numbers_of(clients[1]) == []


@pytest.mark.parametrize(
    "source", [numbers(1, 2), [numbers(1), numbers(2)], {"a": numbers(1), "b": lambda: numbers(2)}]
)
def test_evaluation_data_is_one_set_or_the_union_of_the_clients(source: object) -> None:
    data = ClientDatasets([numbers(0)], val=source, test=source, drop_last=True)
    assert numbers_of(data.val_dataloader()) == [1, 2]
    assert numbers_of(data.test_dataloader()) == [1, 2]


@pytest.mark.parametrize("copied", [lambda data: data, copy.deepcopy, lambda data: pickle.loads(pickle.dumps(data))])
def test_data_left_out_is_not_defined_for_lightning(copied: Callable) -> None:
    data = copied(ClientDatasets([numbers(0)]))
    assert not is_overridden("val_dataloader", data)
    assert not is_overridden("test_dataloader", data)
    with pytest.raises(MisconfigurationException, match="`test_dataloader` must be implemented"):
        data.test_dataloader()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda data: pickle.loads(pickle.dumps(data))])
def test_copies_evaluate_their_own_data(duplicate: object) -> None:
    data = ClientDatasets([numbers(0)], val=numbers(1))
    other = duplicate(data)
    assert numbers_of(other.val_dataloader()) == [1]
    assert other.val_dataloader.__self__ is other


def test_a_plain_trainer_trains_on_the_pooled_data() -> None:
    examples = TensorDataset(torch.randn(12, 4), torch.arange(12) % 3)
    data = ClientDatasets([examples, examples], val=examples, test=examples, batch_size=24)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(MLPClassifier(4, (), 3), data)
    assert trainer.global_step == 2
    assert "val_acc" in trainer.callback_metrics


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[int]:
        yield 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train": []}, "train is empty"),
        ({"train": {}}, "train is empty"),
        ({"train": numbers(1)}, "train is a TensorDataset; expected one data set per client.*PartitionedDataModule"),
        ({"train": [numbers(1)], "batch_size": 0}, "batch_size=0 must be at least 1, or None"),
        ({"train": [numbers(1)], "val": []}, "val is empty.*None"),
        ({"train": [numbers(1)], "test": {}}, "test is empty.*None"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClientDatasets(**arguments)


def test_a_stream_is_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"is a Stream, which has no length.*ClientLoaders"):
        ClientDatasets([Stream()]).train_dataloader()[0]


def test_every_argument_of_a_dataloader_reaches_the_clients() -> None:
    data = ClientDatasets(
        {"a": TensorDataset(torch.arange(9)), "b": TensorDataset(torch.arange(4))},
        val=TensorDataset(torch.arange(6)),
        batch_size=2,
        collate_fn=len,
        sampler=lambda dataset: WeightedRandomSampler([1.0] * len(dataset), 5),
        pin_memory=False,
        worker_init_fn=print,
    )
    clients = data.train_dataloader()
    assert [list(clients[name]) for name in clients] == [[2, 2, 1]] * 2
    assert clients["a"].worker_init_fn is print
    assert count_examples(clients["a"]) == 5
    assert list(data.val_dataloader()) == [2, 2, 2]
    with pytest.raises(ValueError, match="is not an argument of a DataLoader"):
        ClientDatasets([TensorDataset(torch.arange(9))], collat_fn=len)
