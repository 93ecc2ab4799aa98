from __future__ import annotations

import gzip
import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_fl.datamodules import FashionMNISTDataModule, LabelsPerClient, MNISTDataModule, PartitionedDataModule
from lightning_fl.datamodules.datasets.idx import read_idx
from lightning_fl.datamodules.download import RemoteFile
from tests.helpers.data_files import idx_bytes, serve, write_mnist

DEBIAN = Path("/usr/share/datasets/fashion-mnist")


@pytest.mark.parametrize("zipped", [True, False])
def test_reads_the_files_of_a_folder(tmp_path: Path, zipped: bool) -> None:
    images = write_mnist(tmp_path, zipped=zipped)
    data = MNISTDataModule(tmp_path, batch_size=7)
    data.setup("fit")
    assert (len(data.train_set), len(data.test_set)) == (60, 20)
    x, y = data.train_set[13]
    assert (x.dtype, x.shape, y.dtype, y.item()) == (torch.float32, (1, 28, 28), torch.int64, 3)
    assert torch.allclose(x[0], torch.from_numpy(images[13]).float() / 255)
    assert sorted(torch.cat([y for _, y in data.train_dataloader()]).tolist()) == sorted(list(range(10)) * 6)
    assert sum(len(y) for _, y in data.val_dataloader()) == 20


def test_scalings(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    for scaling, axes in (("channel", (0, 2, 3)), ("pixel", 0)):
        data = MNISTDataModule(tmp_path, scaling=scaling)
        data.setup("fit")
        x = torch.stack([x for x, _ in data.train_set])
        assert x.mean(axes).abs().max() < 1e-4
        assert (x.std(axes, correction=0) - 1).abs().max() < 1e-3
    with pytest.raises(ValueError, match="scaling='standard' is unknown"):
        MNISTDataModule(tmp_path, scaling="standard").setup("fit")


def test_a_share_of_the_training_data_validates_and_a_transform_changes_training_only(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    data = MNISTDataModule(tmp_path, val_share=0.25, transform=lambda image: image * 0)
    data.setup("fit")
    assert (len(data.train_set), len(data.val_set), len(data.test_set)) == (45, 15, 20)
    assert not set(data.train_set.indices) & set(data.val_set.indices)
    assert data.train_set[0][0].abs().max() == 0
    assert data.test_set[0][0].abs().max() > 0


def test_is_found_in_the_usual_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_mnist(tmp_path / "data" / "MNIST" / "raw")
    MNISTDataModule().setup("fit")
    monkeypatch.setenv("LIGHTNING_FL_DATA", str(tmp_path / "shared"))
    write_mnist(tmp_path / "shared" / "mnist", num_train=10)
    data = MNISTDataModule()
    data.setup("fit")
    assert len(data.train_set) == 10


def test_missing_files_are_named_with_the_remedy(tmp_path: Path) -> None:
    write_mnist(tmp_path / "some")
    (tmp_path / "some" / "t10k-labels-idx1-ubyte.gz").unlink()
    data = MNISTDataModule(tmp_path / "some")
    data.prepare_data()
    with pytest.raises(FileNotFoundError, match=r"MNIST was not found in .*some. .*`root`.*11.6 MB with download=True"):
        data.setup("fit")


def test_downloads_only_when_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_mnist(tmp_path / "origin")
    with serve() as server:
        server.files = {path.name: path.read_bytes() for path in (tmp_path / "origin").iterdir()}
        files = [
            RemoteFile(name, f"{server.url}/{name}", len(content), hashlib.sha256(content).hexdigest())
            for name, content in server.files.items()
        ]
        monkeypatch.setattr(MNISTDataModule, "files", files)
        MNISTDataModule().prepare_data()
        assert server.requests == []
        data = MNISTDataModule(download=True)
        data.prepare_data()
        data.prepare_data()
        assert len(server.requests) == 4
    data.setup("fit")
    assert len(data.train_set) == 60
    assert len(list((tmp_path / "data" / "mnist").glob("*.gz"))) == 4


def broken(data: bytes, how: str) -> bytes:
    zipped = gzip.compress(data)
    return {
        "cut gzip": zipped[: len(zipped) // 2],
        "cut": data[:-5],
        "cut header": data[:9],
        "longer": data + b"x",
        "other": b"<html>not found</html>",
        "empty": b"",
        "flipped": zipped[:200] + bytes([zipped[200] ^ 255]) + zipped[201:],
        "huge": data[:4] + b"\xff" * 12,
    }[how]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("cut gzip", "is corrupt or truncated"),
        ("cut", r"truncated: it holds 2935 values, but its header gives the shape \[60, 7, 7\], which needs 2940"),
        ("cut header", "is not an IDX file of unsigned bytes"),
        ("longer", r"it holds 2941 values, but its header gives the shape \[60, 7, 7\], which needs 2940"),
        ("other", "is not an IDX file of unsigned bytes: it begins with 3c 68 74 6d"),
        ("empty", "is not an IDX file of unsigned bytes: it begins with nothing"),
        ("flipped", "corrupt"),
        ("huge", "it holds 0 values, but its header gives the shape"),
    ],
)
def test_a_file_that_is_corrupt_is_named(tmp_path: Path, how: str, message: str) -> None:
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(broken(idx_bytes(np.arange(60 * 49).reshape(60, 7, 7) % 251), how))
    with pytest.raises(ValueError, match=rf"{path}.*{message}"):
        read_idx(path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.arange(59) % 10, "has 60 images and 59 labels"),
        (np.arange(60) % 11, "has labels from 0 to 10; expected 0 to 9"),
        (np.zeros((60, 1)), "has 2 axes, expected 1"),
    ],
)
def test_labels_that_do_not_fit_are_refused(tmp_path: Path, values: np.ndarray, message: str) -> None:
    write_mnist(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx_bytes(values)))
    with pytest.raises(ValueError, match=message):
        MNISTDataModule(tmp_path).setup("fit")


def test_test_images_of_another_size_are_refused(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx_bytes(np.zeros((20, 6, 6)))))
    with pytest.raises(ValueError, match=r"shape \[1, 28, 28\] and the test images \[1, 6, 6\]"):
        MNISTDataModule(tmp_path).setup("fit")


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="needs Debian's package dataset-fashion-mnist")
def test_the_real_fashion_mnist_splits_among_ten_thousand_clients() -> None:
    data = FashionMNISTDataModule(batch_size=10)
    clients = PartitionedDataModule(data, LabelsPerClient(2), num_clients=10_000)
    clients.prepare_data()
    clients.setup("fit")
    loaders = clients.train_dataloader()
    assert (len(loaders), sum(map(loaders.num_examples, loaders))) == (10_000, 60_000)
    assert len(torch.cat([y for _, y in loaders[77]]).unique()) == 2
    assert torch.bincount(data.train_set.targets).tolist() == [6000] * 10
    assert len(data.test_set) == 10_000
