from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_fl.data.partitioners.label_skew import Dirichlet
from lightning_fl.data.partitioners.natural import MappingFile, NaturalColumn, save_mapping
from lightning_fl.data.partitioners.partitioner import IID
from lightning_fl.data.splitting import partition_loader


class Letters(Dataset):
    def __init__(self) -> None:
        self.writer = ["bob", "ann", "bob", "eve"]

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        return index


def test_a_column_names_the_clients() -> None:
    clients = partition_loader(DataLoader(Letters(), batch_size=4), NaturalColumn("writer"))
    assert list(clients) == ["ann", "bob", "eve"]
    assert {client: next(iter(loader)).tolist() for client, loader in clients.items()} == {
        "ann": [1],
        "bob": [0, 2],
        "eve": [3],
    }
    assert clients.num_examples("bob") == 2


@pytest.mark.parametrize("names", [["ann", None, "bob", "ann"], ["a", 1, "a", "b"]])
def test_clients_of_several_kinds_are_refused(names: list) -> None:
    for column in (names, np.array(names, dtype=object)):
        with pytest.raises(ValueError, match=r"names clients by \w+ and str; expected integers or strings alone"):
            NaturalColumn(column)(Letters())


def test_a_number_of_clients_that_the_column_contradicts_is_refused() -> None:
    with pytest.raises(ValueError, match=r"num_clients=2 does not fit NaturalColumn.*names 3 clients"):
        NaturalColumn("writer")(Letters(), 2)
    assert len(NaturalColumn("writer")(Letters(), 3)) == 3


def test_clients_with_too_few_samples_are_named() -> None:
    with pytest.raises(
        ValueError, match=r"2 clients of column 'writer' have fewer than min_size=2 .*ann \(1\), eve \(1\)"
    ):
        NaturalColumn("writer", min_size=2)(Letters())


def test_a_saved_partition_comes_back(tmp_path: Path) -> None:
    parts = Dirichlet(1.0, min_size=1)(TensorDataset(torch.zeros(40), torch.arange(40) % 4), 5, seed=3)
    save_mapping(tmp_path / "clients.json", parts)
    again = MappingFile(tmp_path / "clients.json")(range(40))
    assert all(torch.equal(one, other) for one, other in zip(parts, again, strict=True))
    save_mapping(tmp_path / "named.json", {"north": torch.tensor([0, 2]), "south": torch.tensor([1])})
    assert MappingFile(tmp_path / "named.json").client_ids(range(3)) == ["north", "south"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clients.json", "named.json"]


def test_ids_come_back_with_their_types(tmp_path: Path) -> None:
    ids = [1, "1", "01", -3, '"1"', "x", '"', "\u0661", "1.0", "null"]
    save_mapping(tmp_path / "clients.json", {client: torch.tensor([place]) for place, client in enumerate(ids)})
    found = MappingFile(tmp_path / "clients.json").client_ids(range(len(ids)))
    assert list(zip(map(type, found), found, strict=True)) == list(zip(map(type, ids), ids, strict=True))
    save_mapping(tmp_path / "parts.json", IID()(range(6), 3))
    assert MappingFile(tmp_path / "parts.json").client_ids(range(6)) == list(IID().client_ids(range(6), 3))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": [0, 1], "b": [1, 2]}', r"repeats samples: 1 \(1 in all\)"),
        ('{"a": [0], "b": [2]}', r"omits samples: 1 \(1 in all\)"),
        ('{"a": [0, 1], "b": [2, 7]}', "has samples beyond the 3: 7"),
        ('{"a": [0, 1, 2], "b": []}', "has clients without samples: b"),
        ('{"a": [0], "a": [1, 2]}', "has client 'a' twice"),
        ('{"a": [0], "\\"a\\"": [1, 2]}', "has a client twice"),
        ('{"a": [0, 1', "is not a JSON file"),
        ("[[0], [1, 2]]", "is not a mapping file"),
        ('{"a": [0, 1.5, 2]}', "is not a mapping file"),
        ('{"a": [0, -1, 2]}', "is not a mapping file"),
        ("{}", "is not a mapping file"),
    ],
)
def test_a_mapping_file_that_is_wrong_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "clients.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        MappingFile(path)(range(3))


def test_a_mapping_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"clients\.json"):
        MappingFile(tmp_path / "clients.json")(range(3))


def test_a_failed_save_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "clients.json"
    save_mapping(path, IID()(range(4), 2))
    before = json.loads(path.read_text())
    with pytest.raises(AttributeError):
        save_mapping(path, [torch.tensor([0]), None])  # type: ignore[list-item]
    assert json.loads(path.read_text()) == before
