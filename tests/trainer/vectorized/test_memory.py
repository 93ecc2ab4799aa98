"""A step of several clients that does not fit in a GPU's memory is taken by fewer."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

import lightning_fl as fl
from lightning_fl.torch_internals import unwrap
from tests.helpers.training import Plain, image_clients, trainer, weights


class Hungry(Plain):
    """From a round on, the device holds the step of two clients only."""

    first_round = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        stacked = unwrap(next(self.net.parameters()))
        if stacked is not None and len(stacked[0]) > 2 and self.current_epoch >= self.first_round:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return super().training_step(batch, batch_idx)


class HungryLater(Hungry):
    first_round = 1


class Groups(fl.callbacks.FederatedCallback):
    def __init__(self) -> None:
        self.sizes: list[int] = []

    def on_group_end(self, trainer: Any, module: Any, clients: Any) -> None:  # type: ignore[override]
        self.sizes.append(len(clients))


@pytest.mark.parametrize(
    ("make", "engine", "sizes"),
    [
        (Hungry, "auto", [2, 1, 2, 2, 2, 1]),
        (HungryLater, fl.engines.Vectorized(clients_per_step=5), [5, 2, 1, 2]),
    ],
)
def test_groups_are_halved_until_they_fit(
    make: Any, engine: Any, sizes: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    found, expected = make(), make()
    groups = Groups()
    with caplog.at_level(logging.INFO):
        strategy = fl.FederatedStrategy("fedavg", engine=engine, seed=5)
        trainer(strategy, 2, callbacks=[groups]).fit(found, image_clients([9] * 5))
    assert groups.sizes == sizes
    assert strategy.active_driver.grouping.max_clients == 2
    assert "A step of 3 clients does not fit in the GPU's memory; from here on at most 2 train" in caplog.text
    trainer(fl.FederatedStrategy("fedavg", engine="sequential", seed=5), 2).fit(expected, image_clients([9] * 5))
    torch.testing.assert_close(weights(found), weights(expected), rtol=1e-9, atol=1e-11)
