"""Checkpoints without the frozen base of a model."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

import lightning_fl as fl
from tests.helpers.training import Plain, image_clients, trainer, weights
from tests.trainer.tensors.test_frozen import FrozenTarget


class Based(Plain):
    """Half of the network is a frozen base."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.base = nn.Linear(300, 300).requires_grad_(False)
        torch.nn.init.normal_(self.base.weight, generator=torch.Generator().manual_seed(seed))
        nn.init.zeros_(self.base.bias)


def fit(module: Plain, rounds: int, ckpt_path: str | Path | None = None, **settings: object) -> Path:
    callback = ModelCheckpoint(tempfile.mkdtemp(dir="."), save_last=True)
    run = trainer(
        fl.FederatedStrategy("fedadam", **settings),  # type: ignore[arg-type]
        max_epochs=rounds,
        callbacks=[callback],
        enable_checkpointing=True,
    )
    run.fit(module, image_clients(), ckpt_path=ckpt_path)
    return Path(callback.last_model_path)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_the_base_is_left_out_and_training_goes_on_exactly() -> None:
    whole = fit(Based(), 1)
    size = whole.stat().st_size
    whole.unlink()
    checkpoint = fit(Based(), 1, checkpoint_frozen=False)
    assert checkpoint.stat().st_size < size - 300 * 300 * 4
    content = torch.load(checkpoint, weights_only=True)
    assert not [name for name in content["state_dict"] if name.startswith("base.")]
    assert set(content["lightning_fl_frozen"]) == {"base.weight", "base.bias"}
    resumed, through = Based(), Based()
    fit(resumed, 3, checkpoint, checkpoint_frozen=False)
    fit(through, 3)
    assert torch.equal(weights(resumed), weights(through))


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_another_base_is_refused() -> None:
    checkpoint = fit(Based(), 1, checkpoint_frozen=False)
    with pytest.raises(MisconfigurationException, match=r"differ from those that it was trained with: 'base.weight'"):
        fit(Based(seed=1), 2, checkpoint)


def test_a_frozen_teacher_that_moves_stays_in_the_checkpoint() -> None:
    checkpoint = fit(FrozenTarget(through_data=False), 1, checkpoint_frozen=False)
    content = torch.load(checkpoint, weights_only=True)
    assert [name for name in content["state_dict"] if name.startswith("target.")]
    assert content["lightning_fl_frozen"] == {}


def test_weights_alone_are_saved_without_the_base_too() -> None:
    module = Based()
    run = trainer(fl.FederatedStrategy("fedavg", checkpoint_frozen=False))
    run.fit(module, image_clients())
    run.save_checkpoint("weights.ckpt", weights_only=True)
    content = torch.load("weights.ckpt", weights_only=True)
    assert "base.weight" not in content["state_dict"]
    assert "base.weight" in module.state_dict()
