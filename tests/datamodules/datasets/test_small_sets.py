"""Breast cancer and MNIST-1D, which need no files."""

from __future__ import annotations

import lightning as L
import pytest
import torch

from lightning_fl.datamodules import BreastCancerDataModule, MNIST1DDataModule
from lightning_fl.models import LogisticRegression, MLPClassifier


def fit(model: L.LightningModule, data: L.LightningDataModule, epochs: int) -> float:
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    L.seed_everything(0, verbose=False)
    trainer.fit(model, data)
    return trainer.callback_metrics["val_acc"].item()


def test_breast_cancer_is_standardised_and_learned() -> None:
    data = BreastCancerDataModule()
    data.setup("fit")
    x, y = data.train_set[:]
    assert (x.shape, x.dtype, y.dtype, len(data.test_set)) == ((455, 30), torch.float32, torch.int64, 114)
    assert x.mean(0).abs().max() < 1e-5
    assert fit(LogisticRegression(30, 2, lr=0.1), data, 5) > 0.95


@pytest.mark.slow
def test_mnist1d_has_the_difficulty_of_the_paper() -> None:
    data = MNIST1DDataModule(seed=1, batch_size=128)
    data.setup("fit")
    x, y = data.train_set[:]
    assert (x.shape, x.dtype, len(data.test_set)) == ((4000, 40), torch.float32, 1000)
    assert torch.bincount(torch.cat([y, data.test_set[:][1]])).tolist() == [500] * 10
    both = torch.cat([x, data.test_set[:][0]])
    assert abs(both.mean()) < 1e-4
    assert abs(both.std() - 1) < 1e-3
    assert 0.2 < fit(LogisticRegression(40, lr=0.1), data, 5) < 0.45  # the paper: 0.32
    assert 0.5 < fit(MLPClassifier(40, (100, 100), lr=0.1, momentum=0.9), data, 10) < 0.8  # the paper: 0.68


def test_mnist1d_repeats_with_its_seed() -> None:
    first, again, other = (MNIST1DDataModule(100, seed=seed) for seed in (1, 1, 2))
    for data in (first, again, other):
        data.setup("fit")
    assert torch.equal(first.train_set[:][0], again.train_set[:][0])
    assert not torch.equal(first.train_set[:][0], other.train_set[:][0])
    with pytest.raises(ValueError, match="num_samples=55 must be a multiple of 10"):
        MNIST1DDataModule(55)
