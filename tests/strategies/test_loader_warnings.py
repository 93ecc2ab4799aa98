"""Warnings about how clients' loaders read."""

from __future__ import annotations

import warnings

import pytest
from torch.utils.data import DataLoader

from lightning_fl.strategies.user_warnings import UserWarnings


def test_workers_that_spawn_are_warned_of_once() -> None:
    spawned = DataLoader(range(4), num_workers=1, multiprocessing_context="spawn")
    given = UserWarnings()
    with pytest.warns(UserWarning, match="num_workers=1.*Set num_workers=0"):
        given.loader(spawned)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        given.loader(spawned)
        UserWarnings().loader(DataLoader(range(4), num_workers=1, multiprocessing_context="fork"))
        UserWarnings().loader(DataLoader(range(4)))
