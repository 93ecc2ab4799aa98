"""What can't be right is refused: found, expected, what to do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, IterableDataset

import lightning_fl as fl
from lightning_fl import FederatedStrategy
from tests.helpers.training import Ordinary, Plain, image_clients, images, loader, trainer


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"algorithm": "fedavgg"}, "Unknown algorithm 'fedavgg'.*fedavg.*Did you mean 'fedavg'"),
        ({"algorithm": 3}, "algorithm=3 is neither a registered name nor"),
        ({"num_clients": 0}, "num_clients=0 must be a whole number, at least 1"),
        ({"num_clients": 2.5}, "num_clients=2.5 must be a whole number"),
        ({"clients_per_round": 0}, "clients_per_round=0 must be at least 1"),
        ({"clients_per_round": 1.5}, r"share and must lie in \(0, 1\]"),
        ({"clients_per_round": True}, "neither a count"),
        ({"num_clients": 5, "clients_per_round": 6}, "clients_per_round=6 is more than the federation's 5 clients"),
        ({"local_epochs": 1, "local_steps": 5}, "local_epochs=1 and local_steps=5 contradict"),
        ({"local_steps": 0}, "local_steps=0 must be a whole number"),
        ({"weighting": "size"}, "weighting='size' is not known; expected one of None, 'examples', 'uniform'"),
        ({"client_optimizer": "share"}, "client_optimizer='share' is not known"),
        ({"engine": "warp"}, "engine='warp' is not known"),
        ({"personal": None}, r"personal=None is no list.*give \[\]"),
        ({"transforms": None}, "transforms=None is no list"),
    ],
    ids=str,
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FederatedStrategy(**arguments)


def test_an_unknown_strategy_name_is_refused_by_lightning() -> None:
    with pytest.raises(ValueError, match="invalid strategy name: `strategy='fedavgg'`"):
        trainer("fedavgg")


def test_more_clients_a_round_than_there_are() -> None:
    with pytest.raises(ValueError, match="clients_per_round=9 is more than the federation's 2 clients"):
        trainer(FederatedStrategy(clients_per_round=9)).fit(Plain(), image_clients((8, 8)))


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        return iter(images(8))


@pytest.mark.parametrize(
    ("loaders", "message"),
    [
        ([loader(), loader()], "several training loaders"),
        ({"a": loader(), "b": loader()}, "several training loaders"),
        ([loader()], "one inside a list or dict"),
        (DataLoader(Stream(), batch_size=4), "Stream, a stream"),
        (DataLoader(images(8), batch_sampler=[[0, 1], [2]]), "custom batch_sampler list"),
        (loader(5), "num_clients=10 does not fit a data set of 5 samples"),
    ],
    ids=["list", "dict", "list of one", "stream", "sampler", "too few examples"],
)
def test_loaders_that_cannot_be_split(loaders: Any, message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        trainer(FederatedStrategy(num_clients=10)).fit(Plain(), loaders)


@pytest.mark.parametrize("options", [{"num_clients": 3}, {"partition": fl.datamodules.IID()}], ids=str)
def test_settings_that_client_loaders_would_ignore(options: dict[str, Any]) -> None:
    with pytest.raises(MisconfigurationException, match="already names 2 clients"):
        trainer(FederatedStrategy(**options)).fit(Plain(), image_clients((8, 8)))


def test_a_client_without_data_is_named() -> None:
    with pytest.warns(UserWarning, match="Client 1 has no data.*yields no batch"):
        trainer("fedavg").fit(Plain(), image_clients((8, 0, 8)))


def test_no_optimizer() -> None:
    module = Plain()
    module.configure_optimizers = lambda: None  # type: ignore[method-assign]
    with (
        pytest.warns(UserWarning, match="will run with no optimizer"),
        pytest.raises(MisconfigurationException, match="no optimizer, so clients would not train"),
    ):
        trainer("fedavg").fit(module, image_clients((8, 8)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_check_interval": 0.5}, "val_check_interval=0.5 asks for validation inside a round"),
        ({"val_check_interval": 1}, "val_check_interval=1 asks"),
        ({"check_val_every_n_epoch": None, "val_check_interval": 2}, "val_check_interval=2 asks"),
        ({"limit_train_batches": 0.01}, "leaves none of the client's 2 batches"),
    ],
    ids=str,
)
def test_trainer_settings_that_a_round_cannot_honour(options: dict[str, Any], message: str) -> None:
    with pytest.raises((MisconfigurationException, ValueError), match=message):
        # With validation data, since otherwise nothing depends on when it would be validated.
        trainer("fedavg", **options).fit(Ordinary(), image_clients((8, 8), validate=True))


class ShortLoader:
    """Promises more batches than it has."""

    def __len__(self) -> int:
        return 5

    def __iter__(self) -> Iterator[Any]:
        return iter(loader(8))


def test_a_loader_that_breaks_its_promise() -> None:
    clients = fl.datamodules.ClientLoaders({"clinic": ShortLoader()})
    with pytest.raises(ValueError, match="client 'clinic' yielded 2 batches, but its length promised 5"):
        trainer("fedavg").fit(Plain(), clients)


def test_a_round_cut_short_by_a_hook() -> None:
    module = Plain()
    module.on_train_batch_start = lambda batch, batch_idx: -1  # type: ignore[method-assign]
    with pytest.raises(MisconfigurationException, match="must not return -1 in a federation"):
        trainer("fedavg").fit(module, image_clients((8, 8)))


def exploding(batch: Any, batch_idx: int) -> None:
    raise RuntimeError("boom")


def test_an_error_in_a_round_leaves_the_process_clean() -> None:
    before = torch.get_rng_state()
    module = Plain()
    module.on_train_batch_start = exploding  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="boom"):
        trainer("fedavg").fit(module, image_clients((8, 8)))
    assert torch.equal(torch.get_rng_state(), before)
