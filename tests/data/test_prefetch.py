"""Loaders whose workers begin before their client's turn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Sampler, TensorDataset

from lightning_fl.data.prefetch import PrefetchedLoader, can_prefetch

NUMBERS = TensorDataset(torch.arange(20))


class Noisy(torch.utils.data.Dataset):
    """Adds noise to each example that a worker reads."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> torch.Tensor:
        return index + torch.rand(())


class Own(Sampler[int]):
    """Draws random numbers one by one while it is read."""

    def __iter__(self) -> Any:
        return iter([int(torch.randint(20, ())) for _ in range(20)])

    def __len__(self) -> int:
        return 20


def read(loader: Any, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """All examples, and what the global generator draws afterwards."""
    torch.manual_seed(seed)
    examples = torch.cat(list(loader))
    return examples, torch.rand(3)


def loader(**settings: Any) -> DataLoader:
    return DataLoader(Noisy(), batch_size=3, shuffle=True, num_workers=1, **settings)


@pytest.mark.parametrize("generator", [None, torch.Generator()], ids=["global generator", "its own"])
def test_gives_what_the_loader_gives_in_its_turn(generator: torch.Generator | None) -> None:
    def put() -> None:
        torch.manual_seed(5)
        if generator is not None:
            generator.manual_seed(6)

    put()
    expected = read(loader(generator=generator), 5)
    put()
    opened = PrefetchedLoader(loader(generator=generator))
    torch.rand(100)
    put()
    found = read(opened, 5)
    assert all(map(torch.equal, found, expected))
    put()
    assert all(map(torch.equal, read(opened, 5), expected)), "a second pass is read anew"


def test_what_was_read_with_other_random_numbers_is_not_used() -> None:
    torch.manual_seed(5)
    opened = PrefetchedLoader(loader())
    expected = read(loader(), 7)
    assert all(map(torch.equal, read(opened, 7), expected))
    assert not torch.equal(expected[0], read(opened, 5)[0])


@pytest.mark.parametrize(
    ("chosen", "can"),
    [
        (DataLoader(NUMBERS, num_workers=1), True),
        (DataLoader(NUMBERS, num_workers=2, shuffle=True), True),
        (DataLoader(NUMBERS, num_workers=1, sampler=RandomSampler(NUMBERS, replacement=True)), True),
        (DataLoader(NUMBERS), False),
        (DataLoader(NUMBERS, num_workers=1, persistent_workers=True), False),
        (DataLoader(NUMBERS, num_workers=1, sampler=Own()), False),
        (DataLoader(NUMBERS, num_workers=1, batch_sampler=BatchSampler(Own(), 2, False)), False),
        (DataLoader(NUMBERS, num_workers=1, batch_size=None), False),
        ([torch.zeros(2)], False),
    ],
)
def test_which_loaders_can_be_opened(chosen: Any, can: bool) -> None:
    assert can_prefetch(chosen) is can
