"""Batches read together and late are those of the loaders."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from lightning_fl.data.collation import with_fast_collation
from lightning_fl.data.lazy_batches import LazyBatch, LazyLoader, as_lazy, stack_lazy
from lightning_fl.datamodules.image_files import ImageDataset

BASE = TensorDataset(torch.randn(23, 3, 2), torch.arange(23))
IMAGES = ImageDataset(
    torch.arange(23 * 4, dtype=torch.uint8).view(23, 1, 2, 2), torch.arange(23), torch.tensor(3.0), torch.tensor(2.0)
)
PARTS = ([7, 1, 4, 9, 22], [0, 2, 3, 5, 6])


class Doubled(Dataset):
    def __getitem__(self, index: int) -> Any:
        return 2 * BASE[index][0]

    def __len__(self) -> int:
        return len(BASE)


def loaders(kind: str, **options: Any) -> list[DataLoader]:
    if kind == "gathered":
        pairs = [with_fast_collation(Subset(BASE, part), None) for part in PARTS]
        return [DataLoader(dataset, batch_size=2, collate_fn=collate, **options) for dataset, collate in pairs]
    make = {
        "whole": lambda part: TensorDataset(BASE.tensors[0][part], BASE.tensors[1][part]),
        "parts": lambda part: Subset(BASE, part),
        "parts of parts": lambda part: Subset(Subset(BASE, [index + 1 for index in range(22)]), [i // 2 for i in part]),
        "images": lambda part: Subset(IMAGES, part),
    }[kind]
    return [DataLoader(make(part), batch_size=2, **options) for part in PARTS]


@pytest.mark.parametrize("kind", ["whole", "parts", "parts of parts", "gathered", "images"])
@pytest.mark.parametrize("options", [{}, {"shuffle": True}, {"shuffle": True, "drop_last": True}], ids=str)
@pytest.mark.parametrize("has_generator", [False, True])
def test_the_batches_of_the_loaders(kind: str, options: dict[str, Any], has_generator: bool) -> None:
    read = []
    for see in (as_lazy, lambda loader: loader):
        torch.manual_seed(5)
        generator = torch.Generator().manual_seed(6) if has_generator else None
        read.append([list(see(loader)) for loader in loaders(kind, generator=generator, **options)])
        read[-1].append(torch.rand(3))
    (first, second, drawn), (own, others, expected_draw) = read
    assert torch.equal(drawn, expected_draw)
    for rows, batches in zip(zip(first, second, strict=True), zip(own, others, strict=True), strict=True):
        assert all(isinstance(batch, LazyBatch) for batch in rows)
        expected = [torch.stack(pair) for pair in zip(*batches, strict=True)]
        found = stack_lazy(rows)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        assert 2 * rows[0].num_bytes == sum(tensor.nbytes for tensor in found)
        assert rows[0].signature == rows[1].signature


def test_rows_of_other_shapes_have_other_signatures() -> None:
    short, wide = TensorDataset(torch.zeros(4, 2)), TensorDataset(torch.zeros(4, 3))
    kinds = [next(iter(as_lazy(DataLoader(data, batch_size=2)))).signature for data in (short, wide)]
    assert kinds[0] != kinds[1]


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(Doubled(), batch_size=2),
        DataLoader(BASE, batch_size=2, collate_fn=lambda samples: samples),
        DataLoader(BASE, batch_size=None),
        DataLoader(ImageDataset(IMAGES.images, IMAGES.targets, IMAGES.mean, IMAGES.std, torch.neg), batch_size=2),
        [torch.zeros(2)],
    ],
)
def test_what_is_read_in_a_way_of_its_own_stays_as_it_is(loader: Any) -> None:
    assert as_lazy(loader) is loader


def test_the_length_is_that_of_the_loader() -> None:
    loader = as_lazy(DataLoader(BASE, batch_size=4, drop_last=True))
    assert isinstance(loader, LazyLoader)
    assert len(loader) == len(list(loader)) == 5
