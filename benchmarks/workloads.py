"""What benchmarks/simulation.py trains: models, clients and their synthetic data."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics.classification import MulticlassAccuracy

from lightning_fl.models import CharLSTM, CharTransformer

VOCABULARY = 80
LENGTH = 40

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
"""Settings of a Trainer that does nothing but train."""


def prepare_process(num_threads: int = 1) -> None:
    """Lets this process print nothing but figures, and torch use so many threads."""
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(num_threads)


@dataclass(frozen=True)
class Workload:
    """A model and the clients that train it; FedAvg, one local epoch, SGD.

    Args:
        network: Makes the model.
        clients: Clients in the population.
        examples: Examples of each client, or of the largest.
        per_round: Clients that take part in a round.
        batch: Examples in a batch.
        rounds: Rounds that are timed by default.
        is_text: Whether the examples are sequences of characters, each to be told from those before; else images.
        lr: Learning rate of SGD.
        is_unequal: Whether clients have different numbers of examples, lognormal.
        image: Channels, height and width of an image.
    """

    network: Callable[[], nn.Module]
    clients: int
    examples: int
    per_round: int
    batch: int
    rounds: int
    is_text: bool = False
    lr: float = 0.05
    is_unequal: bool = False
    image: tuple[int, int, int] = (1, 28, 28)

    @cached_property
    def sizes(self) -> list[int]:
        """Examples of each client."""
        if not self.is_unequal:
            return [self.examples] * self.clients
        drawn = np.random.default_rng(0).lognormal(math.log(self.examples / 5), 0.8, self.clients)
        return drawn.clip(1, self.examples).astype(int).tolist()

    @property
    def num_classes(self) -> int:
        return VOCABULARY if self.is_text else 10


def logistic() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))


def mlp() -> nn.Module:
    hidden = [nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(200, 10))


def cnn() -> nn.Module:
    first = [nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)]
    second = [nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(3136, 512), nn.ReLU(), nn.Linear(512, 10))


def cifar_cnn() -> nn.Module:
    features = [nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*features, nn.Flatten(), nn.Linear(12544, 128), nn.ReLU(), nn.Linear(128, 10))


def lstm() -> nn.Module:
    return CharLSTM(VOCABULARY, hidden=128).net


def transformer() -> nn.Module:
    return CharTransformer(VOCABULARY, max_length=LENGTH, width=64, num_layers=2, dropout=0.0).net


WORKLOADS = {
    "W1": Workload(logistic, clients=1000, examples=60, per_round=100, batch=10, rounds=20),
    "W1-unequal": Workload(logistic, clients=300, examples=200, per_round=100, batch=10, rounds=20, is_unequal=True),
    "W2": Workload(cnn, clients=100, examples=300, per_round=10, batch=32, rounds=5),
    "W3": Workload(mlp, clients=100, examples=600, per_round=10, batch=10, rounds=10),
    "CIFAR": Workload(cifar_cnn, clients=1000, examples=50, per_round=50, batch=10, rounds=5, image=(3, 32, 32)),
    "LSTM": Workload(lstm, clients=100, examples=24, per_round=20, batch=8, rounds=5, is_text=True),
    "transformer": Workload(transformer, clients=100, examples=24, per_round=20, batch=8, rounds=5, is_text=True),
}


def make_network(work: Workload) -> nn.Module:
    torch.manual_seed(0)
    return work.network()


def make_data(work: Workload) -> tuple[Tensor, Tensor]:
    """Inputs and labels, each of shape ``[clients, examples, ...]``."""
    generator = torch.Generator().manual_seed(1)
    shape = (work.clients, work.examples)
    if work.is_text:
        steps = torch.randint(1, 4, (*shape, LENGTH + 1), generator=generator)
        steps[..., 0] = torch.randint(VOCABULARY, shape, generator=generator)
        text = steps.cumsum(-1) % VOCABULARY
        return text[..., :-1].contiguous(), text[..., 1:].contiguous()
    labels = torch.randint(10, shape, generator=generator)
    images = torch.randn(*shape, *work.image, generator=generator).mul_(0.3)
    patterns = 0.3 * torch.randn(10, *work.image, generator=generator)
    for own, classes in zip(images, labels, strict=True):  # in place: the peak of memory is to be that of training
        own.add_(patterns[classes]).clamp_(-0.5, 0.5)
    return images, labels


def batches_of(client: int, data: tuple[Tensor, Tensor], work: Workload) -> list[tuple[Tensor, Tensor]]:
    return list(zip(*(tensor[client, : work.sizes[client]].split(work.batch) for tensor in data), strict=True))


class Module(L.LightningModule):
    """What a user writes; with ``logs``, it logs its loss and a torchmetric at each step."""

    def __init__(self, work: Workload, logs: bool = False) -> None:
        super().__init__()
        self.network = make_network(work)
        self.lr = work.lr
        self.logs = logs
        self.accuracy = MulticlassAccuracy(work.num_classes, average="micro")

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, labels = batch
        scores = self.network(inputs)
        loss = functional.cross_entropy(scores, labels)
        if self.logs:
            self.accuracy(scores, labels)
            self.log("loss", loss, on_step=False, on_epoch=True)
            self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)
