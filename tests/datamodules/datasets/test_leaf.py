from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lightning_fl.datamodules import FEMNISTDataModule, LEAFDataModule, LEAFShakespeareDataModule


def write(path: Path, by_user: dict[str, tuple[list, list]], **changes: object) -> None:
    """A file as LEAF's README describes it."""
    content = {
        "users": list(by_user),
        "num_samples": [len(y) for _, y in by_user.values()],
        "user_data": {user: {"x": x, "y": y} for user, (x, y) in by_user.items()},
        **changes,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def writer(start: int, number: int) -> tuple[list, list]:
    return [[(start + i) / 1000] * 784 for i in range(number)], [(start + i) % 62 for i in range(number)]


def test_femnist_by_writer(tmp_path: Path) -> None:
    write(tmp_path / "train" / "all_data_0_train.json", {"f0001_41": writer(0, 5), "f0000_14": writer(10, 3)})
    write(tmp_path / "train" / "all_data_1_train.json", {"f0002_07": writer(60, 4)})
    write(tmp_path / "test" / "all_data_0_test.json", {"f0000_14": writer(20, 2), "f0001_41": writer(30, 1)})
    data = FEMNISTDataModule(tmp_path, batch_size=2)
    data.setup("fit")
    assert data.client_ids == ["f0000_14", "f0001_41", "f0002_07"]
    clients = data.train_dataloader()
    assert [clients.num_examples(client) for client in clients] == [3, 5, 4]
    x, y = data.client_dataset("f0002_07")[2]
    assert (x.shape, x.dtype, y.item()) == ((1, 28, 28), torch.float32, 0)
    assert x[0, 5, 5] == pytest.approx(0.062)
    assert torch.cat([y for _, y in data.test_dataloader()]).tolist() == [20, 21, 30]
    assert list(data.client_test_dataloaders()) == ["f0000_14", "f0001_41"]


@pytest.mark.parametrize("folder", ["all_data", "."])
def test_without_a_test_folder_clients_keep_a_share(tmp_path: Path, folder: str) -> None:
    write(tmp_path / folder / "part.json", {"ann": ([[0.5, 1.5]] * 10, [0, 1] * 5)})
    data = LEAFDataModule(tmp_path, num_classes=2, test_share=0.3)
    data.setup("fit")
    assert [data.num_samples("ann", part) for part in ("train", "val", "test")] == [7, 0, 3]
    assert data.client_dataset("ann")[0][0].tolist() == [0.5, 1.5]


def test_leaf_shakespeare_gives_characters(tmp_path: Path) -> None:
    line = "To be, or not to be: that is the question.\nWhether 'tis nobler in the mind to suff"[:80]
    write(tmp_path / "train" / "a.json", {"HAMLET": ([line], ["u"])})
    data = LEAFShakespeareDataModule(tmp_path, test_share=0.0)
    data.setup("fit")
    x, y = data.client_dataset("HAMLET")[0]
    assert (x.shape, x.dtype, y.shape) == ((80,), torch.int64, ())
    assert x[1] == x[7] == x[15] != x[0]  # the "o" of "To", "or" and "to"
    assert y == x[line.index("question") + 1]


@pytest.mark.parametrize(
    ("users", "changes", "message"),
    [
        (
            {"ann": ([[1.0]], [0])},
            {"num_samples": [1, 1]},
            "has 1 users and 2 entries of num_samples",
        ),
        (
            {"ann": ([[1.0]], [0])},
            {"num_samples": [2]},
            r"'ann' of .* has 1 samples and 1 labels, expected num_samples=2",
        ),
        ({"ann": ([[1.0]], [0, 1])}, {}, "has 1 samples and 2 labels"),
        ({"ann": ([], [])}, {}, "has 0 samples and 0 labels, expected .* at least 1"),
        ({"ann": ([[1.0]], [0])}, {"users": ["bob"]}, "'bob' of .* has 0 samples"),
        ({"ann": ([[1.0]], [2])}, {}, "'ann' in .*labels range from 2 to 2, expected 0 to 1"),
        ({"ann": ([[float("nan")]], [0])}, {}, "x has NaN or infinite values"),
        ({"ann": ([[1.0], [1.0, 2.0]], [0, 1])}, {}, "samples of user 'ann' in .* can't be read"),
        ({"ann": ([["text"]], [0])}, {}, "samples of user 'ann' in .* can't be read"),
        ({"ann": ([[1.0], [2.0]], [0, 1.7])}, {}, "labels such as 1.7 are not whole numbers"),
        ({"ann": ([[1.0]], [0])}, {"users": ["ann", "ann"], "num_samples": [1, 1]}, "names user 'ann' twice"),
        ({"ann": ([[1.0]], [0])}, {"user_data": [1]}, "is not a LEAF file"),
        ({"ann": ([[1.0]], [0])}, {"user_data": {"ann": None}}, "'ann' of .* has 0 samples"),
        ({"ann": ([[1.0]], [0])}, {"users": 3}, "is not a LEAF file"),
        ({"ann": ([[1.0]], [0])}, {"num_samples": None}, "is not a LEAF file or is truncated .KeyError"),
    ],
)
def test_files_that_are_wrong_are_refused(tmp_path: Path, users: dict, changes: dict, message: str) -> None:
    write(tmp_path / "train" / "a.json", users, **changes)
    with pytest.raises(ValueError, match=message):
        LEAFDataModule(tmp_path, num_classes=2).setup("fit")


def test_a_file_cut_short_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "train" / "a.json", {"ann": ([[1.0]], [0])})
    path = tmp_path / "train" / "a.json"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"a.json is not a LEAF file or is truncated"):
        LEAFDataModule(tmp_path).setup("fit")


def test_a_user_in_two_files_is_refused(tmp_path: Path) -> None:
    for name in ("a.json", "b.json"):
        write(tmp_path / "train" / name, {"ann": ([[1.0]], [0])})
    with pytest.raises(ValueError, match=r"User 'ann' is in .*b.json and in another file"):
        LEAFDataModule(tmp_path).setup("fit")


def test_a_folder_without_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no .json file; set `root` to LEAF's data directory"):
        LEAFDataModule(tmp_path).setup("fit")
