"""The file of a training step against torch's own optimizers, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

import lightning_fl as fl
from lightning_fl.models import Classifier, MLPClassifier

X, Y = torch.rand(4, 1, 8, 8), torch.tensor([1, 2, 3, 0])
Optimizer = Callable[[Any], torch.optim.Optimizer]


def train_both(module: nn.Module, path: Path, optimizer: torch.optim.Optimizer, lr: float, steps: int) -> float:
    """Trains the module with torch, and its copy through the file; returns the largest difference of a parameter."""
    session = onnxruntime.InferenceSession(path)
    outputs = [given.name for given in session.get_outputs()]
    params = dict(module.named_parameters())
    feeds = {
        given.name: np.zeros(given.shape, np.float32)
        for given in session.get_inputs()
        if given.name.startswith("optimizer.")
    }
    feeds |= {f"parameter.{name}": own.detach().numpy().copy() for name, own in params.items() if own.requires_grad}
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        size = int(torch.randint(1, 9, (), generator=generator))
        x = torch.rand(size, 1, 8, 8, generator=generator)
        y = torch.randint(0, 10, (size,), generator=generator)
        optimizer.zero_grad()
        loss = cross_entropy(module(x), y)
        loss.backward()
        optimizer.step()
        given = {"batch.0": x.numpy(), "batch.1": y.numpy(), "lr": np.array(lr, np.float32)}
        found = dict(zip(outputs, session.run(None, {**feeds, **given}), strict=True))
        assert found.pop("loss") == pytest.approx(loss.item(), abs=1e-5)
        feeds = {name.removeprefix("next."): value for name, value in found.items()}
    return max(
        float((torch.from_numpy(feeds[f"parameter.{name}"]) - own).detach().abs().max())
        for name, own in params.items()
        if own.requires_grad
    )


OPTIMIZERS: dict[str, tuple[str | None, float, Optimizer]] = {
    "sgd": ("sgd", 0.1, lambda params: torch.optim.SGD(params, lr=0.1)),
    "momentum": ("momentum", 0.02, lambda params: torch.optim.SGD(params, lr=0.02, momentum=0.9)),
    "adam": ("adam", 0.001, lambda params: torch.optim.Adam(params, lr=0.001)),
    "nesterov": (None, 0.02, lambda params: torch.optim.SGD(params, 0.02, 0.8, nesterov=True, weight_decay=0.01)),
    "adamw": (None, 0.002, lambda params: torch.optim.AdamW(params, 0.002, (0.8, 0.99), 1e-7, weight_decay=0.1)),
    "adam_decay": (None, 0.002, lambda params: torch.optim.Adam(params, 0.002, weight_decay=0.01)),
}


def test_three_hundred_steps_are_those_of_torch(digits_step: Path) -> None:
    module = MLPClassifier(hidden=[16], lr=0.1)
    module.load_state_dict(load_file(digits_step.with_suffix(".safetensors")))
    before = module.net[1].weight.clone()
    assert train_both(module, digits_step, module.configure_optimizers(), 0.1, 300) < 1e-5
    assert (module.net[1].weight - before).abs().max() > 0.05  # it has trained


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_three_hundred_steps_of_each_optimizer_are_those_of_torch(name: str) -> None:
    torch.manual_seed(0)
    module = MLPClassifier(hidden=[16])
    given, lr, make = OPTIMIZERS[name]
    optimizer = make(module.parameters())
    step = fl.devices.export_training_step(module, (X, Y), "step.onnx", given or optimizer)
    assert step.parameters == ("net.1.weight", "net.1.bias", "net.3.weight", "net.3.bias")
    assert step.difference < 1e-5
    assert train_both(module, Path("step.onnx"), optimizer, lr, 300) < 1e-5


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(8, 5, batch_first=True)
        self.head = nn.Linear(5, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x[:, 0])[0][:, -1])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x[:, 0]).flatten(1))


def convolutions() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 6, 2, dilation=2)),
        *(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(6, 10)),
    )


def depthwise() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 12, 3, padding=1, groups=6), nn.Conv2d(12, 4, 1), nn.ReLU()),
        *(nn.Conv2d(4, 4, 3, stride=2, groups=2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10)),
    )


def pools() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 3, 3), nn.MaxPool2d(2), nn.GELU(), nn.Flatten(), nn.LayerNorm(27), nn.Linear(27, 10)),
    )


@pytest.mark.slow
@pytest.mark.parametrize("network", [convolutions, depthwise, pools, Recurrent, Attention])
def test_layers(network: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    module = Classifier(network(), lr=0.05)
    fl.devices.export_training_step(module, (X, Y), "step.onnx")
    assert train_both(module, Path("step.onnx"), module.configure_optimizers(), 0.05, 30) < 1e-5


@pytest.mark.slow
def test_frozen_parameters_are_constants_and_batches_may_have_names() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.Linear(4, 1))
    module[1].requires_grad_(False)
    step = fl.devices.export_training_step(
        module,
        {"image": X, "target": torch.rand(4, 1)},
        "step.onnx",
        torch.optim.SGD(module[2].parameters(), lr=0.1),
        loss=lambda module, batch: mse_loss(module(batch["image"]), batch["target"]),
    )
    assert step.parameters == ("2.weight", "2.bias")
    assert step.batch == ("image", "target")


# ---- what is refused


@pytest.mark.slow
def test_a_loss_that_rests_on_the_length_of_the_example() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    def loss(module: nn.Module, batch: Any, size: Callable[[Tensor], int] = len) -> Tensor:
        return cross_entropy(module(batch[0]), batch[1], reduction="sum") / size(batch[1])

    with pytest.raises(ValueError, match=r"does not train like Sequential.* use y.shape\[0\]"):
        fl.devices.export_training_step(module, (X, Y), "step.onnx", "sgd", loss)
    assert list(Path().iterdir()) == []
    fl.devices.export_training_step(module, (X, Y), "step.onnx", "sgd", lambda *own: loss(*own, lambda y: y.shape[0]))


def refused(message: str, network: nn.Module, **options: Any) -> None:
    with pytest.raises(ValueError, match=message):
        fl.devices.export_training_step(Classifier(network), (X, Y), "step.onnx", **options)
    assert list(Path().iterdir()) == []


def test_what_a_device_cant_do_is_refused() -> None:
    flat = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    refused("changes the buffers net.0.running_mean.* as BatchNorm", nn.Sequential(nn.BatchNorm2d(1), *flat))
    refused("draws random numbers, as dropout", nn.Sequential(*flat, nn.Dropout()))
    refused("Unknown optimizer 'rmsprop'; expected one of sgd, momentum, adam", flat, optimizer="rmsprop")
    refused("does not support Adagrad", flat, optimizer=torch.optim.Adagrad(flat.parameters()))
    refused("does not support Adam with amsgrad", flat, optimizer=torch.optim.Adam(flat.parameters(), amsgrad=True))
    groups = torch.optim.SGD([{"params": [own]} for own in flat.parameters()], lr=0.1)
    refused("2 parameter groups", flat, optimizer=groups)
    refused("trainable parameters, all of them float32", flat.double())


class Scheduled(MLPClassifier):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


def test_a_schedule_would_be_ignored() -> None:
    with pytest.raises(ValueError, match="expected one optimizer without a schedule"):
        fl.devices.export_training_step(Scheduled(), (X, Y), "step.onnx")


def test_batches_that_are_none() -> None:
    module = MLPClassifier()
    for example, message in (((X, Y[:3]), r"have \[4, 3\] examples"), ((X, 1), "is not a batch")):
        with pytest.raises(ValueError, match=message):
            fl.devices.export_training_step(module, example, "step.onnx")  # type: ignore[arg-type]


class Branch(MLPClassifier):
    """Its way depends on the values."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > 0 else super().forward(-x)


def test_what_cant_be_traced_leaves_nothing_behind() -> None:
    with pytest.raises(ValueError, match="The training step of Branch can't be written"):
        fl.devices.export_training_step(Branch(hidden=[4]), (X, Y), "step.onnx")
    assert list(Path().iterdir()) == []


def test_a_module_is_not_changed() -> None:
    module = MLPClassifier(hidden=[4]).eval()
    before = {name: own.clone() for name, own in module.state_dict().items()}
    with pytest.raises(ValueError, match="changes the buffers"):
        fl.devices.export_training_step(Classifier(nn.Sequential(nn.BatchNorm2d(1), module)), (X, Y), "step.onnx")
    assert not module.training
    assert all(torch.equal(own, before[name]) for name, own in module.state_dict().items())
    assert module.log.__func__ is MLPClassifier.log
