from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_fl.models import (
    CharLSTM,
    CharTransformer,
    FedAvgCNN,
    LeNet,
    LogisticRegression,
    ResNet18GN,
    ResNet20GN,
    TabularMLP,
    TabularRegressor,
    TimmClassifier,
    TorchvisionClassifier,
    TransformersClassifier,
    TwoNN,
)
from lightning_fl.models.libraries import replace_batch_norm


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def fit(model: L.LightningModule, loader: Any, epochs: int = 1) -> dict[str, float]:
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, loader, loader)
    return {name: value.item() for name, value in trainer.callback_metrics.items()}


@pytest.mark.parametrize(
    ("model", "number"),
    [
        (LogisticRegression(), 7_850),
        (TwoNN(), 199_210),  # McMahan et al., section 3
        (FedAvgCNN(), 1_663_370),  # the same
        (LeNet(3, 32), 62_006),
        (LeNet(), 44_426),
        (ResNet20GN(), 269_722),  # He et al., table 6: 0.27 M
        (ResNet18GN(), 11_173_962),
        (ResNet18GN(num_classes=100), 11_220_132),  # Reddi et al., table 1
        (CharLSTM(90), 820_522 + 2 * 1024),  # the same, and the second bias of torch's LSTM
        (CharTransformer(81, width=64, num_layers=2), 115_665),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_numbers_of_parameters_are_those_of_the_papers(model: nn.Module, number: int) -> None:
    assert num_parameters(model) == number


def test_the_transformers_formula_holds() -> None:
    vocabulary, width, length, layers = 30, 16, 20, 3
    model = CharTransformer(vocabulary, max_length=length, width=width, num_layers=layers)
    formula = 2 * vocabulary * width + vocabulary + length * width + layers * (12 * width**2 + 13 * width) + 2 * width
    assert num_parameters(model) == formula


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (LogisticRegression(), (1, 28, 28)),
        (TwoNN(), (1, 28, 28)),
        (FedAvgCNN(), (1, 28, 28)),
        (FedAvgCNN(3, 32), (3, 32, 32)),
        (LeNet(), (1, 28, 28)),
        (LeNet(3, 32), (3, 32, 32)),
        (ResNet20GN(), (3, 32, 32)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_image_models_train_and_evaluate(model: L.LightningModule, shape: tuple[int, ...]) -> None:
    data = TensorDataset(torch.rand(4, *shape), torch.arange(4))
    metrics = fit(model, DataLoader(data, batch_size=2))
    assert {"train_loss", "val_loss", "val_acc"} <= set(metrics)
    assert not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


@pytest.mark.parametrize("make", [CharLSTM, CharTransformer])
def test_text_models_do_not_see_what_comes_after(make: type) -> None:
    model = make(10).eval()
    text = torch.randint(0, 10, (2, 12))
    changed = text.clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % 10
    with torch.no_grad():
        scores, others = model(text), model(changed)
    assert scores.shape == (2, 10, 12)
    assert torch.allclose(scores[:, :, :6], others[:, :, :6], atol=1e-6)
    assert not torch.allclose(scores[:, :, 6:], others[:, :, 6:], atol=1e-3)


@pytest.mark.parametrize(("make", "lr"), [(CharLSTM, 0.5), (CharTransformer, 0.02)])
@pytest.mark.parametrize("every_place", [True, False])
@pytest.mark.spread(1)
def test_text_models_learn_a_cycle_of_characters(make: type, lr: float, every_place: bool) -> None:
    L.seed_everything(0, verbose=False)
    text = (torch.arange(9) + torch.arange(5).unsqueeze(1)) % 5
    labels = text[:, 1:] if every_place else text[:, -1]
    size = {"hidden": 32} if make is CharLSTM else {"width": 32}
    model = make(5, every_place, momentum=0.9, lr=lr, **size)
    metrics = fit(model, DataLoader(TensorDataset(text[:, :-1], labels), batch_size=5), epochs=60)
    assert metrics["val_acc"] == 1.0


def test_a_sequence_that_is_too_long_is_refused() -> None:
    with pytest.raises(ValueError, match="sequences have 9 characters, more than max_length=8"):
        CharTransformer(5, max_length=8)(torch.zeros(1, 9, dtype=torch.int64))


@pytest.mark.slow
def test_the_regressor_works_in_the_unit_of_the_target() -> None:
    L.seed_everything(0, verbose=False)
    x = torch.randn(256, 3)
    y = 1000 + 100 * (x @ torch.tensor([1.0, -2.0, 0.5]))
    loader = DataLoader(TensorDataset(x, y), batch_size=32)
    model = TabularRegressor(3, hidden=(), target_mean=1000.0, target_std=200.0, lr=0.05)
    metrics = fit(model, loader, epochs=20)
    assert metrics["val_mae"] < 1.0
    assert metrics["val_loss"] == pytest.approx(((model(x) - y) ** 2).mean().item() / 200**2, rel=1e-3)
    assert model.predict_step([x], 0).shape == (256,)
    with pytest.raises(ValueError, match="target_std=0"):
        TabularRegressor(3, target_std=0)


def test_the_tabular_classifier_learns() -> None:
    L.seed_everything(0, verbose=False)
    x = torch.randn(256, 3)
    metrics = fit(
        TabularMLP(3, (16,), lr=0.1), DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=32), epochs=10
    )
    assert metrics["val_acc"] > 0.95


def with_batch_norm(num_classes: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.Sequential(nn.BatchNorm2d(4)),
        nn.Flatten(),
        nn.Linear(4 * 36, num_classes),
    )


def test_batch_norm_is_replaced_at_any_depth() -> None:
    net = replace_batch_norm(with_batch_norm(10))
    assert [type(net[1]), type(net[2][0])] == [nn.GroupNorm, nn.GroupNorm]
    assert replace_batch_norm(nn.Sequential(nn.BatchNorm2d(3)))[0].num_groups == 1  # type: ignore[index]


def library(monkeypatch: pytest.MonkeyPatch, name: str, **attributes: Any) -> None:
    module = ModuleType(name)
    module.__dict__.update(attributes)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("weights", [None, "IMAGENET1K_V1"])
def test_torchvision(monkeypatch: pytest.MonkeyPatch, weights: str | None) -> None:
    def get_model(name: str, weights: str | None, num_classes: int = 1000) -> nn.Module:
        assert name == "resnet18"
        return with_batch_norm(num_classes)

    library(monkeypatch, "torchvision")
    library(monkeypatch, "torchvision.models", get_model=get_model)
    model = TorchvisionClassifier("resnet18", 7, weights=weights, group_norm=True)
    assert model(torch.rand(2, 3, 8, 8)).shape == (2, 7)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def test_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    library(monkeypatch, "timm", create_model=lambda name, pretrained, num_classes: with_batch_norm(num_classes))
    assert TimmClassifier("resnet18", 7)(torch.rand(2, 3, 8, 8)).shape == (2, 7)


class Tiny(nn.Module):
    def __init__(self, num_labels: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.head = nn.Linear(8, num_labels)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        states = self.embed(input_ids) * attention_mask.unsqueeze(-1)
        return SimpleNamespace(logits=self.head(states.sum(1)))


@pytest.mark.parametrize("pretrained", [True, False])
def test_transformers(monkeypatch: pytest.MonkeyPatch, pretrained: bool) -> None:
    def load(name: str, num_labels: int, local_files_only: bool, ignore_mismatched_sizes: bool = False) -> Any:
        assert (name, local_files_only) == ("tiny", True)
        return Tiny(num_labels) if pretrained else SimpleNamespace(num_labels=num_labels)

    auto = SimpleNamespace(from_pretrained=load, from_config=lambda config: Tiny(config.num_labels))
    library(
        monkeypatch,
        "transformers",
        AutoModelForSequenceClassification=auto,
        AutoConfig=SimpleNamespace(from_pretrained=load),
    )
    rows = [
        {"input_ids": torch.arange(5) + i, "attention_mask": torch.ones(5), "labels": torch.tensor(i % 2)}
        for i in range(6)
    ]
    model = TransformersClassifier("tiny", pretrained=pretrained)
    assert "val_acc" in fit(model, DataLoader(rows, batch_size=3))  # type: ignore[arg-type]
    assert model.predict_step(next(iter(DataLoader(rows, batch_size=3))), 0).shape == (3,)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "package"),
    [(TorchvisionClassifier, "torchvision"), (TimmClassifier, "timm"), (TransformersClassifier, "transformers")],
)
def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch, make: type, package: str) -> None:
    for name in (package, f"{package}.models"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=f"pip install {package}"):
        make("resnet18")
