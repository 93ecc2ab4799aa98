from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_fl.datamodules import CIFAR10DataModule, CIFAR100DataModule
from tests.helpers.data_files import cifar_archive

RED, GREEN, BLUE = (bytes([value] * 1024) for value in (10, 20, 30))


def records(labels: list[bytes]) -> list[tuple[bytes, bytes]]:
    return [(label, RED + GREEN + bytes([index]) + BLUE[1:]) for index, label in enumerate(labels)]


def ten() -> dict[str, list[tuple[bytes, bytes]]]:
    batches = {f"data_batch_{i}.bin": records([bytes([i])] * 2) for i in range(1, 6)}
    return {**batches, "test_batch.bin": records([bytes([9]), bytes([0])]), "readme.html": [(b"", b"hello")]}


def test_cifar10_from_the_archive(tmp_path: Path) -> None:
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(cifar_archive("cifar-10-batches-bin", ten()))
    data = CIFAR10DataModule(tmp_path)
    data.setup("fit")
    assert data.train_set.targets.tolist() == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert data.test_set.targets.tolist() == [9, 0]
    x, _ = data.train_set[1]
    assert x.shape == (3, 32, 32)
    expected = torch.tensor([10, 20, 30]).reshape(3, 1, 1).expand(3, 32, 32).clone()
    expected[2, 0, 0] = 1
    assert torch.allclose(x, expected / 255)
    assert [path.name for path in tmp_path.iterdir()] == ["cifar-10-binary.tar.gz"]


@pytest.mark.parametrize("inside", ["", "cifar-10-batches-bin"])
def test_cifar10_from_a_folder(tmp_path: Path, inside: str) -> None:
    (tmp_path / inside).mkdir(exist_ok=True)
    for name, content in ten().items():
        (tmp_path / inside / name).write_bytes(b"".join(label + pixels for label, pixels in content))
    data = CIFAR10DataModule(tmp_path)
    data.setup("fit")
    assert (len(data.train_set), len(data.test_set)) == (10, 2)


def test_cifar100_takes_the_fine_label(tmp_path: Path) -> None:
    files = {"train.bin": records([bytes([3, 99]), bytes([4, 7])]), "test.bin": records([bytes([0, 50])])}
    (tmp_path / "cifar-100-binary.tar.gz").write_bytes(cifar_archive("cifar-100-binary", files))
    data = CIFAR100DataModule(tmp_path)
    data.setup("fit")
    assert data.train_set.targets.tolist() == [99, 7]
    assert data.test_set.targets.tolist() == [50]
    assert np.isclose(data.train_set[0][0][1, 5, 5], 20 / 255)


def test_an_archive_cut_short_is_refused(tmp_path: Path) -> None:
    whole = cifar_archive("cifar-10-batches-bin", ten())
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"cifar-10-binary.tar.gz is corrupt or truncated"):
        CIFAR10DataModule(tmp_path).setup("fit")


@pytest.mark.parametrize("place", [-6, 0.5])
def test_an_archive_with_a_flipped_byte_is_refused(tmp_path: Path, place: float) -> None:
    whole = bytearray(cifar_archive("cifar-10-batches-bin", ten()))
    whole[place if place < 0 else int(place * len(whole))] ^= 1  # type: ignore[index]
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(whole)
    with pytest.raises(ValueError, match=r"cifar-10-binary.tar.gz is corrupt or truncated"):
        CIFAR10DataModule(tmp_path).setup("fit")


def test_an_archive_of_something_else_is_refused(tmp_path: Path) -> None:
    files = {name: content for name, content in ten().items() if name != "data_batch_3.bin"}
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(cifar_archive("cifar-10-batches-bin", files))
    with pytest.raises(ValueError, match=r"does not contain data_batch_3.bin"):
        CIFAR10DataModule(tmp_path).setup("fit")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([(b"\x01", RED)], "has 1025 bytes, expected a multiple of the record size 3073"),
        (records([b"\x0b"]), "labels from 1 to 11"),
    ],
)
def test_records_that_are_wrong_are_refused(tmp_path: Path, content: list, message: str) -> None:
    files = {**ten(), "data_batch_2.bin": content}
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(cifar_archive("cifar-10-batches-bin", files))
    with pytest.raises(ValueError, match=message):
        CIFAR10DataModule(tmp_path).setup("fit")


def test_what_is_not_there_is_named_with_its_size(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"CIFAR-100 was not found .* download 168.5 MB with download=True"):
        CIFAR100DataModule(tmp_path).setup("fit")
