"""Which engine trains the clients where the user leaves it open."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import lightning_fl as fl
from tests.helpers.training import Plain, image_clients, trainer


class Long(Plain):
    """Its step multiplies matrices: 128 million floating-point operations."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = torch.ones(400, 400, dtype=torch.float64) @ torch.ones(400, 400, dtype=torch.float64)
        return super().training_step(batch, batch_idx) * x.mean() / 400


@pytest.mark.parametrize(
    ("engine", "kind", "largest_unit"), [("auto", Plain, 3), ("auto", Long, 1), ("vectorized", Long, 3)]
)
def test_long_steps_train_alone_unless_asked_for(engine: str, kind: type[Plain], largest_unit: int) -> None:
    strategy = fl.FederatedStrategy("fedavg", engine=engine)
    trainer(strategy, 1).fit(kind(), image_clients((7, 7, 7)))
    assert max(map(len, strategy.active_driver.trained_groups)) == largest_unit
