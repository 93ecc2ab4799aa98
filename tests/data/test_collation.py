"""Batches read by one indexing are those that ``default_collate`` makes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_fl.data.collation import with_fast_collation

TENSORS = torch.randn(11, 3), torch.arange(11)


@pytest.mark.parametrize("dataset", [TensorDataset(*TENSORS), Subset(TensorDataset(*TENSORS), [7, 1, 4, 9])])
@pytest.mark.parametrize("shuffle", [False, True])
def test_the_same_batches_in_the_same_order(dataset: Any, shuffle: bool) -> None:
    sooner, collate_fn = with_fast_collation(dataset, None)
    assert sooner is not dataset
    found, expected = (
        list(DataLoader(own, batch_size=3, shuffle=shuffle, collate_fn=fn, generator=torch.Generator().manual_seed(1)))
        for own, fn in ((sooner, collate_fn), (dataset, None))
    )
    assert len(found) == len(expected)
    for batch, other in zip(found, expected, strict=True):
        assert type(batch) is type(other)
        torch.testing.assert_close(batch, other, rtol=0, atol=0)
    assert len(sooner) == len(dataset)
    torch.testing.assert_close(sooner[2], dataset[2])


def test_an_empty_batch_has_the_shapes_of_a_batch() -> None:
    assert [
        tuple(tensor.shape) for tensor in with_fast_collation(TensorDataset(*TENSORS), None)[0].__getitems__([])
    ] == [
        (0, 3),
        (0,),
    ]


def test_a_part_of_it_is_read_as_any_data_set() -> None:
    sooner, collate_fn = with_fast_collation(TensorDataset(*TENSORS), None)
    (batch,) = DataLoader([sooner[5], sooner[2]], batch_size=2, collate_fn=collate_fn)
    torch.testing.assert_close(batch, [TENSORS[0][[5, 2]], TENSORS[1][[5, 2]]])
    (batch,) = DataLoader(Subset(sooner, [5, 2]), batch_size=2, collate_fn=collate_fn)
    torch.testing.assert_close(batch, [TENSORS[0][[5, 2]], TENSORS[1][[5, 2]]])


def test_what_is_read_in_a_way_of_its_own_stays_as_it_is() -> None:
    class Own(TensorDataset):
        def __getitem__(self, index: Any) -> Any:
            return super().__getitem__(index)[0]

    assert with_fast_collation(Own(*TENSORS), None)[1] is None
    assert with_fast_collation(TensorDataset(*TENSORS), list)[1] is list
