"""Small modules, data and Trainers for tests; importable in worker processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

import lightning_fl as fl

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def trainer(strategy: Any = "fedavg", max_epochs: int = 1, **kwargs: Any) -> L.Trainer:
    return L.Trainer(strategy=strategy, max_epochs=max_epochs, **{**QUIET, **kwargs})


def weights(module: nn.Module) -> Tensor:
    return torch.cat([tensor.detach().double().reshape(-1) for tensor in module.state_dict().values()])


def measured(fit: L.Trainer) -> dict[str, float]:
    """The metrics that callbacks find, without the federation's own figures."""
    return {name: value.item() for name, value in fit.callback_metrics.items() if not name.startswith("fl/")}


class Quadratic(L.LightningModule):
    """F_i(x) = h_i / 2 (x - e_i)^2; an example is a pair (e_i, h_i)."""

    def __init__(self, start: float = 10.0, lr: float = 0.1) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.tensor([start], dtype=torch.float64))
        self.lr = lr

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        e, h = batch
        return (0.5 * h * (self.x - e) ** 2).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def quadratic_clients(
    e: Sequence[float] = (0.0, 1.0, 4.0), h: Sequence[float] = (1.0, 2.0, 0.5), sizes: Sequence[int] = (1, 2, 1)
) -> fl.datamodules.ClientDatasets:
    datasets = [
        TensorDataset(torch.full((n,), center, dtype=torch.float64), torch.full((n,), steepness, dtype=torch.float64))
        for center, steepness, n in zip(e, h, sizes, strict=True)
    ]
    return fl.datamodules.ClientDatasets(datasets, batch_size=None)


class WithOwn(Quadratic):
    """The same with a second number beside x, to be personal, which wants to the same place."""

    def __init__(self, start: float = 10.0, lr: float = 0.1) -> None:
        super().__init__(start, lr)
        self.own = nn.Parameter(torch.tensor([start], dtype=torch.float64))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        e, h = batch
        return super().training_step(batch, batch_idx) + (0.5 * h * (self.own - e) ** 2).mean()


class WithNorm(Quadratic):
    """The same with a BatchNorm layer that it does not use."""

    def __init__(self, start: float = 10.0, lr: float = 0.1) -> None:
        super().__init__(start, lr)
        self.norm = nn.BatchNorm1d(2)


def minimise(
    strategy: Any, rounds: int, clients: Any = None, lr: float = 0.1, kind: type[Quadratic] = Quadratic, **kwargs: Any
) -> float:
    module = kind(lr=lr)
    trainer(strategy, rounds, **kwargs).fit(module, quadratic_clients() if clients is None else clients)
    return module.x.item()


def images(num_examples: int, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_examples, 1, 4, 4, generator=generator)
    return TensorDataset(x, (x.mean((1, 2, 3)) > 0).long() + 2 * (x[:, 0, 0, 0] > 0.5).long())


class Plain(L.LightningModule):
    """A small network that draws no random numbers and logs nothing."""

    def __init__(self, dtype: torch.dtype = torch.float64, make_optimizer: Any = None, lr: float = 0.1) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 4)).to(dtype)
        self.make_optimizer = make_optimizer or (lambda params: torch.optim.SGD(params, lr=lr))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.net(x.to(self.net[1].weight.dtype)), y)

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.parameters())


class Ordinary(L.LightningModule):
    """What users write: BatchNorm, Adam, a cosine schedule, logged losses and a logged torchmetric."""

    def __init__(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            layers = [nn.Conv2d(1, 3, 2, bias=False), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(27, 4)]
            self.net = nn.Sequential(*layers).to(dtype)
        self.train_acc = MulticlassAccuracy(4, average="micro")
        self.val_acc = MulticlassAccuracy(4, average="micro")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        logits = self.net(x.to(self.net[0].weight.dtype))
        loss = nn.functional.cross_entropy(logits, y)
        self.train_acc(logits, y)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("default", loss.detach() * 2)
        self.log("train_acc", self.train_acc, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        logits = self.net(x.to(self.net[0].weight.dtype))
        self.val_acc(logits, y)
        self.log("val_loss", nn.functional.cross_entropy(logits, y))
        self.log("val_acc", self.val_acc)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def image_clients(
    sizes: Sequence[int] = (1, 7, 23), batch_size: int | None = 4, validate: bool = False
) -> fl.datamodules.ClientDatasets:
    datasets = [images(size, seed) for seed, size in enumerate(sizes)]
    return fl.datamodules.ClientDatasets(datasets, val=images(40, 99) if validate else None, batch_size=batch_size)


def loader(num_examples: int = 24, batch_size: int = 4, seed: int = 0, **kwargs: Any) -> DataLoader:
    return DataLoader(images(num_examples, seed), batch_size=batch_size, **kwargs)
