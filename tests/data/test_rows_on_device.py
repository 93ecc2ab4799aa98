"""Data sets that stay on a device; the device is one that is computed on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_fl.data.collation import IndexedTensors
from lightning_fl.data.lazy_batches import LazyBatch, stack_lazy
from lightning_fl.data.rows_on_device import RowsOnDevice
from lightning_fl.datamodules.image_files import ImageDataset
from tests.helpers.second_device import DEVICE, OnDevice, SecondDevice

X, Y = torch.arange(12.0).reshape(6, 2), torch.arange(6)


def on_cpu(tensors: list[Tensor]) -> list[Tensor]:
    assert all(isinstance(tensor, OnDevice) for tensor in tensors)
    return [tensor.to("cpu") for tensor in tensors]


def images() -> ImageDataset:
    pixels = torch.randint(256, (6, 1, 2, 2), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return ImageDataset(pixels, Y.clone(), torch.tensor([[[7.0]]]), torch.tensor([[[3.0]]]))


@pytest.mark.parametrize("make", [lambda: IndexedTensors(X.clone(), Y.clone()), images], ids=["tensors", "images"])
def test_batches_are_gathered_on_the_device(make: Any) -> None:
    source = make()
    batches = [LazyBatch(source, np.array(rows)) for rows in ([5, 0], [2, 2])]
    expected = stack_lazy(batches)
    with SecondDevice():
        rows = RowsOnDevice(DEVICE, lambda: 1000)
        found = on_cpu(stack_lazy(batches, rows.place))
        assert rows.place(source) is rows.place(source)
    for own, other in zip(found, expected, strict=True):
        assert torch.equal(own, other)


def test_data_that_was_written_to_is_moved_again() -> None:
    source = IndexedTensors(X.clone(), Y.clone())
    with SecondDevice():
        rows = RowsOnDevice(DEVICE, lambda: 96)  # as many as it has: what was moved before is given up
        rows.place(source)
        source.tensors[0].add_(1)
        found = on_cpu(rows.place(source).gather(np.array([0])))
    assert found[0].tolist() == [[1.0, 2.0]]


def test_what_does_not_fit_stays_where_it_is() -> None:
    first, second = IndexedTensors(X.clone(), Y.clone()), IndexedTensors(X.clone(), Y.clone())
    asked: list[int] = []
    with SecondDevice():
        rows = RowsOnDevice(DEVICE, lambda: asked.append(0) or 100)  # type: ignore[func-returns-value]
        assert rows.place(first) is not first
        assert rows.place(second) is second
        assert RowsOnDevice(DEVICE, lambda: 0).place(first) is first
    assert asked == [0]  # what is free later is less by what has been moved
    there = RowsOnDevice(torch.device("cpu"), lambda: 1000)
    assert there.place(first) is first
