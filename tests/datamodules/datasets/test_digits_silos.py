from __future__ import annotations

import pytest
from torch.utils.data import TensorDataset

from lightning_fl.datamodules import DigitsDataModule, DigitsSiloDataModule


def images(dataset: TensorDataset) -> set[bytes]:
    return {image.numpy().tobytes() for image in dataset.tensors[0]}


def silo_data(silo: int) -> DigitsSiloDataModule:
    data = DigitsSiloDataModule(shares=[1, 1, 3], silo=silo)
    data.setup("fit")
    return data


@pytest.mark.parametrize(("part", "sizes"), [("train_set", [287, 288, 862]), ("test_set", [72, 72, 216])])
def test_silos_share_no_digit_and_hold_all_together(part: str, sizes: list[int]) -> None:
    everything = DigitsDataModule()
    everything.setup("fit")
    parts = [getattr(silo_data(silo), part) for silo in range(3)]
    assert [len(dataset) for dataset in parts] == sizes
    assert set.union(*map(images, parts)) == images(getattr(everything, part))
    assert sum(len(images(dataset)) for dataset in parts) == len(images(getattr(everything, part)))


def test_there_must_be_as_many_ranks_as_silos() -> None:
    with pytest.raises(ValueError, match=r"3 silos, but the federation has 1 rank\(s\). Start one process per silo"):
        DigitsSiloDataModule(shares=[1, 1, 3]).setup("fit")


@pytest.mark.parametrize("shares", [[], [1, 0], [2, -1]])
def test_shares_must_be_positive(shares: list[float]) -> None:
    with pytest.raises(ValueError, match="must have a positive number for each silo"):
        DigitsSiloDataModule(shares=shares)


def test_a_silo_must_have_a_share() -> None:
    with pytest.raises(ValueError, match=r"silo=3 is out of range for shares=\[1, 1, 3\]: expected 0 to 2"):
        DigitsSiloDataModule(silo=3)
