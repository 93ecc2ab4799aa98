from pathlib import Path

import pytest
import torch

import lightning_fl as fl
from lightning_fl.models import MLPClassifier


@pytest.fixture(scope="session")
def digits_step(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training step of SGD for a perceptron on digits."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("step") / "step.onnx"
    module = MLPClassifier(hidden=[16])
    fl.devices.export_training_step(module, (torch.rand(4, 1, 8, 8), torch.tensor([1, 2, 3, 0])), path)
    return path
