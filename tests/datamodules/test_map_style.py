from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_fl.data.targets import targets
from lightning_fl.datamodules import (
    ClientLoaders,
    Dirichlet,
    HuggingFaceDataModule,
    PartitionedDataModule,
    TorchDataModule,
)
from lightning_fl.datamodules.map_style import to_tensor


class Visits(Dataset):
    def __init__(self, number: int = 12) -> None:
        self.shop = [["north", "south", "south"][i % 3] for i in range(number)]
        self.targets = [i % 2 for i in range(number)]

    def __len__(self) -> int:
        return len(self.shop)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.tensor([float(index)]), self.targets[index]


def test_a_column_of_any_torch_data_set_names_the_clients() -> None:
    data = TorchDataModule(Visits(), client="shop", test_share=0.0, batch_size=20)
    clients = data.train_dataloader()
    assert isinstance(clients, ClientLoaders)
    (north, _), (south, _) = (next(iter(clients[name])) for name in ("north", "south"))
    assert sorted(north.flatten().tolist()) == [0, 3, 6, 9]
    assert sorted(south.flatten().tolist()) == [1, 2, 4, 5, 7, 8, 10, 11]


def test_without_a_client_it_is_in_one_place_and_can_be_partitioned() -> None:
    data = TorchDataModule(Visits(), Visits(5), test_share=0.0)
    assert isinstance(data.train_dataloader(), DataLoader)
    assert len(data.test_dataloader().dataset) == 5
    clients = PartitionedDataModule(data, Dirichlet(1.0), num_clients=2).train_dataloader()
    assert sum(map(clients.num_examples, clients)) == 12


def test_a_missing_column_is_refused() -> None:
    with pytest.raises(ValueError, match="Visits has no column 'site'"):
        TorchDataModule(Visits(), client="site").setup("fit")
    tensors = TensorDataset(torch.zeros(3, 1), torch.tensor([5, 4, 5]), torch.zeros(3))
    assert TorchDataModule(tensors, client=1).client_ids == [4, 5]


class Rows:
    """What this package uses of a Hugging Face data set."""

    def __init__(self, columns: dict[str, list]) -> None:
        self.columns = columns
        self.column_names = list(columns)

    def __len__(self) -> int:
        return len(self.columns[self.column_names[0]])

    def __getitem__(self, key: int | str) -> object:
        return self.columns[key] if isinstance(key, str) else {name: self.columns[name][key] for name in self.columns}


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stands in for the library ``datasets``."""
    images = [Image.fromarray(np.full((4, 4), 51 * i, dtype=np.uint8)) for i in range(4)]
    rows = Rows(
        {"image": images, "character": [3, 1, 2, 3], "writer_id": ["b", "a", "b", "b"], "age": [1.5, 2.0, 3, 4]}
    )
    seen = SimpleNamespace(calls=[], loaded={"train": rows, "test": rows})
    module = ModuleType("datasets")

    def load_dataset(path: str, name: str | None, download_config: SimpleNamespace) -> object:
        seen.calls.append((path, name, download_config.local_files_only))
        if download_config.local_files_only:
            raise ConnectionError("offline")
        return seen.loaded

    def load_from_disk(path: str) -> object:
        seen.calls.append((path,))
        return seen.loaded

    module.DownloadConfig = SimpleNamespace  # type: ignore[attr-defined]
    module.load_dataset, module.load_from_disk = load_dataset, load_from_disk  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return seen


def test_a_hugging_face_data_set_by_writer(library: SimpleNamespace) -> None:
    data = HuggingFaceDataModule(
        "some/femnist", target="character", client="writer_id", test_split="test", test_share=0.0, download=True
    )
    data.setup("fit")
    assert library.calls == [("some/femnist", None, False)]
    assert data.client_ids == ["a", "b"]
    x, y = data.client_dataset("b")[1]
    assert (x.shape, y.dtype, y.item()) == ((1, 4, 4), torch.int64, 2)
    assert torch.allclose(x, torch.full((1, 4, 4), 102 / 255))
    assert data.client_dataset("b", "test")[0][1] == 3
    assert len(data.test_dataloader().dataset) == 4


def test_columns_of_numbers_join_and_targets_are_known_without_reading_rows(
    library: SimpleNamespace, tmp_path: Path
) -> None:
    data = HuggingFaceDataModule(tmp_path, ["age", "character"], "character", test_share=0.0)
    data.setup("fit")
    assert library.calls == [(str(tmp_path),)]
    assert data.pooled()[0][0].tolist() == [1.5, 3.0]
    assert targets(data.pooled()).tolist() == [3, 1, 2, 3]


def test_a_transform_makes_the_examples(library: SimpleNamespace, tmp_path: Path) -> None:
    data = HuggingFaceDataModule(tmp_path, transform=lambda row: (row["age"] * 2, row["writer_id"]), test_share=0.0)
    assert data.pooled()[1] == (4.0, "a")


def test_nothing_is_downloaded_unless_told(library: SimpleNamespace) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"neither a folder nor the name of a data set on disk \(offline\).*download=True"
    ):
        HuggingFaceDataModule("some/set").setup("fit")
    assert library.calls == [("some/set", None, True)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "digit"}, "has no column 'digit'; it has image, character, writer_id, age"),
        ({"features": ["age", "size"]}, "has no column 'size'"),
        ({"train_split": "all"}, "has no split 'all'; it has train, test"),
        ({"test_split": "valid"}, "has no split 'valid'"),
        ({"client": "site"}, "has no column 'site'"),
    ],
)
def test_names_that_are_wrong_are_refused(
    library: SimpleNamespace, tmp_path: Path, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        HuggingFaceDataModule(tmp_path, **{"target": "character", **options}).setup("fit")


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="pip install datasets"):
        HuggingFaceDataModule("some/set").setup("fit")


def test_values_become_tensors() -> None:
    assert to_tensor(Image.new("RGB", (3, 2)), "x").shape == (3, 2, 3)
    assert to_tensor([1, 2], "x").dtype == torch.int64
    assert to_tensor(0.5, "x").dtype == torch.float32
    for value in ("text", [[1], [2, 3]], None):
        with pytest.raises(ValueError, match=r"Column 'x' has a .*Set `transform` to a function"):
            to_tensor(value, "x")
