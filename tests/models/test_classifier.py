from __future__ import annotations

from pathlib import Path

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_fl.models import Classifier, MLPClassifier

X, Y = torch.randn(10, 1, 2, 2, generator=torch.Generator().manual_seed(0)), torch.arange(10) % 3
TRAIN, EVAL = DataLoader(TensorDataset(X, Y), batch_size=10), DataLoader(TensorDataset(X, Y), batch_size=4)


def make_trainer(**options: object) -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(accelerator="cpu", max_epochs=1, **{"enable_checkpointing": False, **quiet, **options})


def test_mlp_layers() -> None:
    shapes = [list(p.shape) for p in MLPClassifier(4, (8, 5), 3).parameters()]
    assert shapes == [[8, 4], [8], [5, 8], [5], [3, 5], [3]]
    assert [list(p.shape) for p in MLPClassifier(4, (), 3).parameters()] == [[3, 4], [3]]
    assert MLPClassifier(4, (8, 5), 3)(X).shape == (10, 3)


def test_evaluation_logs_the_loss_and_accuracy_of_all_examples() -> None:
    model = MLPClassifier(4, (8,), 3)
    trainer = make_trainer()
    (tested,) = trainer.test(model, EVAL, verbose=False)
    (validated,) = trainer.validate(model, EVAL, verbose=False)
    with torch.no_grad():
        scores = model(X)
    accuracy = (scores.argmax(dim=1) == Y).float().mean().item()
    loss = cross_entropy(scores, Y).item()
    assert tested == pytest.approx({"test_loss": loss, "test_acc": accuracy})
    assert validated == pytest.approx({"val_loss": loss, "val_acc": accuracy})


def test_fit_takes_a_step_of_sgd_on_the_cross_entropy() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    before = net[1].weight.detach().clone()
    (gradient,) = torch.autograd.grad(cross_entropy(net(X), Y), net[1].weight)
    trainer = make_trainer()
    trainer.fit(Classifier(net, 3, lr=0.5), TRAIN, EVAL)
    assert torch.allclose(net[1].weight, before - 0.5 * gradient, atol=1e-6)
    assert {"train_loss", "val_loss", "val_acc"} <= set(trainer.callback_metrics)


def test_optimizer_is_sgd_with_the_given_settings() -> None:
    optimizer = MLPClassifier(lr=0.3, momentum=0.8).configure_optimizers()
    assert isinstance(optimizer, torch.optim.SGD)
    assert (optimizer.defaults["lr"], optimizer.defaults["momentum"]) == (0.3, 0.8)


def test_predict_gives_classes() -> None:
    model = MLPClassifier(4, (8,), 3)
    predicted = torch.cat(make_trainer().predict(model, EVAL))
    assert torch.equal(predicted, model(X).argmax(dim=1))
    assert torch.equal(model.predict_step(X, 0), predicted)


def test_a_checkpoint_restores_the_model(tmp_path: Path) -> None:
    model = MLPClassifier(4, (8, 5), 3, lr=0.2, momentum=0.5)
    trainer = make_trainer()
    trainer.fit(model, TRAIN, EVAL)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    restored = MLPClassifier.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True)
    assert dict(restored.hparams) == {"in_features": 4, "hidden": (8, 5), "num_classes": 3, "lr": 0.2, "momentum": 0.5}
    assert torch.equal(restored(X), model(X))
