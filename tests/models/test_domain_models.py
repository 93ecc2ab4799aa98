"""Survival and segmentation: losses and figures against closed forms and known coefficients."""

from __future__ import annotations

import math
from pathlib import Path

import pandas
import pytest
import torch

import lightning_fl as fl
from lightning_fl.datamodules import LungDataModule, ShapesDataModule
from lightning_fl.models import SignalCNN, SmallUNet
from lightning_fl.models.survival import concordance, cox_loss

LUNG = Path(__file__).parents[2] / "examples" / "lung.csv"


def test_the_partial_likelihood_is_that_of_cox() -> None:
    y = torch.tensor([[1.0, 1.0], [2.0, 0.0], [3.0, 1.0], [3.0, 1.0]])
    assert cox_loss(torch.zeros(4), y).item() == pytest.approx((math.log(4) + 2 * math.log(2)) / 3)
    assert cox_loss(torch.ones(4), y * torch.tensor([1.0, 0.0])).item() == 0  # nobody had an event
    table = pandas.read_csv(LUNG)
    x = torch.tensor(table[["age", "sex"]].to_numpy(), dtype=torch.float64)
    y = torch.tensor(table[["time", "status"]].to_numpy(), dtype=torch.float64)
    exact = torch.tensor([0.01701289, -0.51256479], dtype=torch.float64, requires_grad=True)  # Breslow, lifelines
    (gradient,) = torch.autograd.grad(cox_loss(x @ exact, y), exact)
    assert gradient.abs().max() < 1e-5
    wrong = torch.tensor([0.0, -0.4], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.grad(cox_loss(x @ wrong, y), wrong)[0].abs().max() > 0.01


def test_the_concordance_counts_comparable_pairs() -> None:
    y = torch.tensor([[1.0, 1.0], [2.0, 0.0], [3.0, 1.0], [4.0, 0.0]])
    assert concordance(torch.tensor([4.0, 3.0, 2.0, 1.0]), y).item() == 1
    assert concordance(torch.tensor([1.0, 2.0, 3.0, 4.0]), y).item() == 0
    assert concordance(torch.zeros(4), y).item() == 0.5
    # First against three others, third against the last; the second was lost before anything is known of it.
    assert concordance(torch.tensor([4.0, 5.0, 1.0, 2.0]), y).item() == pytest.approx(2 / 4)


def test_dice_is_of_all_pixels() -> None:
    module = SmallUNet(width=4)
    logged: dict[str, float] = {}
    module.log = lambda name, value, **_: logged.update({name: float(value)})  # type: ignore[method-assign]
    masks = torch.zeros(2, 16, 16)
    masks[0, :4] = 1
    module.forward = lambda x: x.squeeze(1)  # type: ignore[method-assign]
    found = torch.full((2, 1, 16, 16), -1.0)
    found[0, 0, :2] = 1.0
    module.validation_step((found, masks), 0)
    module.on_validation_epoch_end()
    assert logged["val_dice"] == pytest.approx(2 * 32 / (32 + 64))
    module.validation_step((found * 0 - 1, masks * 0), 0)
    module.on_validation_epoch_end()
    assert logged["val_dice"] == 1.0


def test_the_data_are_what_they_say() -> None:
    data = LungDataModule(LUNG, features=("age", "sex"))
    assert len(data.client_ids) == 18
    assert sum(data.data.size(client) for client in data.client_ids) == 227  # one row has no institution
    x, y = data.data.open(3)[0]
    assert (x.shape, y.tolist()) == ((2,), [306.0, 1.0])
    with pytest.raises(ValueError, match="must be some of"):
        LungDataModule(LUNG, features=("meal.cal",))
    shapes = ShapesDataModule(num_clients=2, images=5)
    first, again = (ShapesDataModule(num_clients=2, images=5).data.open(1).tensors for _ in range(2))
    assert torch.equal(first[0], again[0])
    assert (first[0].shape, first[1].shape) == ((5, 1, 32, 32), (5, 32, 32))
    assert 0.02 < float(first[1].mean()) < 0.4
    assert not torch.equal(first[0], shapes.data.open(0).tensors[0])
    x, labels = fl.datamodules.MovementsDataModule(num_clients=2, windows=50).data.open(1).tensors
    assert (x.shape, x.dtype, labels.dtype) == ((50, 3, 64), torch.float32, torch.int64)
    assert sorted(labels.unique().tolist()) == [0, 1, 2, 3]
    assert SignalCNN()(x).shape == (50, 4)
    with pytest.raises(ValueError, match="expected at least 1, 2 and 16"):
        fl.datamodules.MovementsDataModule(length=8)
    with pytest.raises(ValueError, match="even number from 16"):
        fl.datamodules.ShapesDataModule(size=15)
