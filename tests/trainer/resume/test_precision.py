"""Resuming is exact where the Trainer, not the module, chooses double precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

import lightning_fl as fl
from tests.helpers.training import image_clients, trainer, weights


class Single(L.LightningModule):
    """Written in single precision, as modules are."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(16, 4))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize("strategy", ["fedavg", "fedadam"])
def test_resuming_in_double_precision_is_exact(strategy: str) -> None:
    def fit(folder: str, path: Path | None = None) -> Tensor:
        module, saved = Single(), ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
        run = trainer(
            fl.FederatedStrategy(strategy, seed=0), 2, precision="64-true", enable_checkpointing=True, callbacks=[saved]
        )
        run.fit(module, image_clients((5, 7)), ckpt_path=path, weights_only=True)
        assert module.net[1].weight.dtype == torch.float64
        return weights(module)

    whole = fit("whole")
    assert torch.equal(fit("again", Path("whole/epoch=0.ckpt")), whole)
