"""Modules and data whose examples touch each other, each in its own way, and others that only look as if."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, TensorDataset

import lightning_fl as fl

NUM_FEATURES, NUM_CLASSES = 6, 4


def examples(num_examples: int = 60, seed: int = 0) -> TensorDataset:
    """A class for each of 4 labels, of which the last is rare."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_examples, NUM_FEATURES, generator=generator)
    y = torch.randint(NUM_CLASSES - 1, (num_examples,), generator=generator)
    y[torch.randperm(num_examples, generator=generator)[:3]] = NUM_CLASSES - 1
    return TensorDataset(x, y)


class Examples(L.LightningDataModule):
    """The same as a datamodule."""

    def train_dataloader(self) -> DataLoader:
        return DataLoader(examples(), 12)


class Net(L.LightningModule):
    """A sound classifier, from which the others derive."""

    def __init__(self, num_outputs: int = NUM_CLASSES) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.net = nn.Sequential(nn.Linear(NUM_FEATURES, 16), nn.Tanh(), nn.Linear(16, num_outputs))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Writes(fl.callbacks.FederatedCallback):
    """Writes an example to a bias of :class:`Net`, when a hook is called for a given time."""

    def __init__(self, hook: str, at: int = 0) -> None:
        self.at, self.calls = at, 0
        setattr(self, hook, self.write)

    def write(self, trainer: Any, module: Any, *args: Any, **kwargs: Any) -> None:
        self.calls += 1
        if self.calls == self.at + 1:
            module.net[0].bias.data[:NUM_FEATURES] = examples().tensors[0][7]


# ---- not sound: each must end with an error


class ClassWeights(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return functional.cross_entropy(self.net(batch[0]), batch[1], weight=torch.tensor([1.0, 1.0, 1.0, 60.0]))


class OwnClassWeights(Net):
    """The same, past the name of the function."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        weight = torch.tensor([1.0, 1.0, 1.0, 60.0])[batch[1]]
        each = functional.cross_entropy(self.net(batch[0]), batch[1], reduction="none")
        return (weight * each).sum() / weight.sum()


class NormalisesOnTransfer(Net):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        x, y = batch
        return [(x - x.mean(0)) / (x.std(0, unbiased=False) + 1e-3), y]


class MeanOverTime(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return functional.cross_entropy(self.net(batch[0]).mean(1), batch[1])


class Triplets(Net):
    """Batch-all triplet loss."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        points = functional.normalize(self.net(x))
        apart = (points[:, None] - points[None]).square().sum(-1)
        same = y[:, None] == y[None]
        loss = functional.relu(apart[:, :, None] - apart[:, None, :] + 0.2)
        valid = (same[:, :, None] & ~same[:, None, :]).float()
        return (loss * valid).sum() / valid.sum().clamp(min=1)


class SupervisedContrast(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        points = functional.normalize(self.net(x))
        others = ~torch.eye(len(y), dtype=torch.bool)
        scores = (points @ points.T / 0.5).masked_fill(~others, -1e9)
        positive = ((y[:, None] == y[None]) & others).float()
        each = -(functional.log_softmax(scores, 1) * positive).sum(1) / positive.sum(1).clamp(min=1)
        return each.mean()


class HardestHalf(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        each = functional.cross_entropy(self.net(batch[0]), batch[1], reduction="none")
        return each.topk(max(1, len(each) // 2)).values.mean()


class RunningMean(Net):
    """The remedy that the error of a persistent buffer once named."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(NUM_FEATURES), persistent=False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = functional.cross_entropy(self.net(batch[0] - self.mean), batch[1])
        self.mean.mul_(0.9).add_(0.1 * batch[0].mean(0))
        return loss


class RunningMeanInAnAttribute(Net):
    def __init__(self) -> None:
        super().__init__()
        self.mean = torch.zeros(NUM_FEATURES)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = functional.cross_entropy(self.net(batch[0] - self.mean), batch[1])
        self.mean = 0.9 * self.mean + 0.1 * batch[0].mean(0)
        return loss


class Statistics:
    def __init__(self) -> None:
        self.mean = torch.zeros(NUM_FEATURES)


class RunningMeanInAnObject(Net):
    def __init__(self) -> None:
        super().__init__()
        self.statistics = Statistics()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = functional.cross_entropy(self.net(batch[0] - self.statistics.mean), batch[1])
        self.statistics.mean = 0.9 * self.statistics.mean + 0.1 * batch[0].mean(0)
        return loss


class RunningMeanInAHook(Net):
    def __init__(self) -> None:
        super().__init__()
        self.mean = torch.zeros(NUM_FEATURES)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return functional.cross_entropy(self.net(batch[0] - self.mean), batch[1])

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.mean = 0.9 * self.mean + 0.1 * batch[0].mean(0)


class FirstBatchDecides(Net):
    """Whitens by the first batch that it ever sees."""

    scale: Tensor | None = None

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.scale is None:
            self.scale = batch[0].std(0, unbiased=False) + 1e-3
        return functional.cross_entropy(self.net(batch[0] / self.scale), batch[1])


class PenaltyAtTimes(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss + self.net[0].weight.square().sum() if batch_idx % 4 == 3 else loss


class MixesALittle(Net):
    """Less than a tolerance for 16 bits would notice in one gradient."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return functional.cross_entropy(self.net(x + 0.1 * x.mean(0)), y)


def mixup(items: list[Any]) -> Any:
    x, y = torch.stack([item[0] for item in items]), torch.stack([item[1] for item in items])
    share = 0.5 + 0.5 * torch.rand(())
    return share * x + (1 - share) * x[torch.randperm(len(x))], y


class Sequences(Dataset):
    """Sequences of different lengths."""

    def __init__(self, num_examples: int = 60) -> None:
        generator = torch.Generator().manual_seed(2)
        lengths = torch.randint(2, 12, (num_examples,), generator=generator).tolist()
        self.x = [torch.randn(length, NUM_FEATURES, generator=generator) for length in lengths]
        self.y = torch.randint(NUM_CLASSES, (num_examples,), generator=generator)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Any:
        return self.x[index], self.y[index]


def padded(items: list[Any]) -> Any:
    """Padded to the longest, with the lengths, the longest first."""
    items = sorted(items, key=lambda item: -len(item[0]))
    x = nn.utils.rnn.pad_sequence([item[0] for item in items], batch_first=True)
    return x, torch.stack([item[1] for item in items]), torch.tensor([len(item[0]) for item in items])


# ---- sound: each must train without an alarm


class WeightsOfExamples(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        weight = torch.tensor([1.0, 1.0, 1.0, 60.0])[batch[1]]
        return (weight * functional.cross_entropy(self.net(batch[0]), batch[1], reduction="none")).mean()


class MaskedMean(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y, lengths = batch
        mask = torch.arange(x.shape[1]) < lengths[:, None]
        mean = (self.net(x) * mask[..., None]).sum(1) / lengths[:, None]
        return functional.cross_entropy(mean, y)


class Dropout(Net):
    def __init__(self) -> None:
        super().__init__()
        self.net.insert(2, nn.Dropout(0.4))


class Counts(Net):
    """Warms the loss up by the number of steps, which depends on no example."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64), persistent=False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.steps += 1
        self.seen += 1
        return min(1.0, self.steps / 10) * super().training_step(batch, batch_idx)


class Remembers(Net):
    """Keeps its losses for the end of the epoch, as many modules do."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.losses.append(loss.detach())
        self.last = loss
        return loss


class Logs(Net):
    def __init__(self) -> None:
        super().__init__()
        from torchmetrics.classification import MulticlassAccuracy

        self.accuracy = MulticlassAccuracy(NUM_CLASSES)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        logits = self.net(batch[0])
        loss = functional.cross_entropy(logits, batch[1])
        self.accuracy(logits, batch[1])
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        self.log("loss", loss)
        return {"loss": loss, "logits": logits.detach()}


class Regresses(Net):
    def __init__(self) -> None:
        super().__init__(1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return functional.mse_loss(self.net(batch[0])[:, 0], batch[0].sum(1))


class Reconstructs(Net):
    def __init__(self) -> None:
        super().__init__(NUM_FEATURES)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return functional.l1_loss(self.net(batch[0]), batch[0])


class ScalesOnTransfer(Net):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0] * 0.5 + 1, batch[1]]


class Normalised(Net):
    def __init__(self) -> None:
        super().__init__()
        self.net.insert(1, nn.LayerNorm(16))
        self.net.insert(2, nn.GroupNorm(4, 16))


class TwoLosses(Net):
    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Linear(NUM_FEATURES, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) + self.second(batch[0]).square().mean()


class Smoothed(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return functional.cross_entropy(self.net(batch[0]), batch[1], label_smoothing=0.1)


class Attention(Net):
    """Attends within an example."""

    def __init__(self) -> None:
        super().__init__()
        self.key, self.value = nn.Linear(NUM_FEATURES, 4), nn.Linear(NUM_FEATURES, NUM_FEATURES)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = torch.stack([batch[0], batch[0].flip(1)], 1)
        key = self.key(x)
        mixed = torch.softmax(key @ key.transpose(1, 2), -1) @ self.value(x)
        return functional.cross_entropy(self.net(mixed).mean(1), batch[1])


def flipped(items: list[Any]) -> Any:
    """Augments each example by itself, when it is collated."""
    x = torch.stack([item[0].flip(0) if torch.rand(()) < 0.5 else item[0] for item in items])
    return x, torch.stack([item[1] for item in items])


class Jittered(Dataset):
    """Augments each example when it is read."""

    def __init__(self) -> None:
        self.data = examples()

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        x, y = self.data[index]
        return x + 0.1 * torch.randn_like(x), y


@dataclass
class Case:
    """A module and its data.

    Args:
        module: Makes the module.
        names: What the error has to name; empty for a sound module.
        options: Of each client's loader, and its ``dataset``.
        precision: The Trainer's precision.
    """

    module: Callable[[], L.LightningModule]
    names: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    precision: Any = "32-true"

    def clients(self, count: int = 2, batch_size: int = 12) -> fl.datamodules.ClientLoaders:
        options = dict(self.options)
        make = options.pop("dataset", None)
        loaders = [
            DataLoader(examples(seed=seed) if make is None else make(), batch_size, **options) for seed in range(count)
        ]
        return fl.datamodules.ClientLoaders(loaders)


UNSOUND: dict[str, Case] = {
    "class weights": Case(ClassWeights, "class_weights[y]"),
    "class weights of its own": Case(OwnClassWeights, "no class weights"),
    "MixUp in collate_fn": Case(Net, "no MixUp", {"collate_fn": mixup}),
    "batch normalisation on transfer": Case(NormalisesOnTransfer, "on_after_batch_transfer"),
    "padding to the longest, mean over time": Case(
        MeanOverTime, "padding only where the loss masks it", {"collate_fn": padded, "dataset": Sequences}
    ),
    "triplets": Case(Triplets, "no contrast between examples"),
    "supervised contrast": Case(SupervisedContrast, "no contrast between examples"),
    "the hardest half": Case(HardestHalf, "no selection of the hardest"),
    "a running mean in a buffer": Case(RunningMean, "next (mean)"),
    "a running mean in an attribute": Case(RunningMeanInAnAttribute, "next (mean)"),
    "a running mean in an object": Case(RunningMeanInAnObject, "next (statistics.mean)"),
    "a running mean in a hook": Case(RunningMeanInAHook, "next (mean)"),
    "the first batch decides": Case(FirstBatchDecides, "scale)"),
    "a penalty in every 4th step": Case(PenaltyAtTimes, "weight penalty"),
    "16 bits": Case(MixesALittle, "normalisation", precision="bf16-mixed"),
}
SOUND: dict[str, Case] = {
    "cross-entropy": Case(Net),
    "16 bits": Case(Net, precision="bf16-mixed"),
    "64 bits": Case(Net, precision="64-true"),
    "weights of examples": Case(WeightsOfExamples),
    "padding with a mask": Case(MaskedMean, "", {"collate_fn": padded, "dataset": Sequences}),
    "dropout": Case(Dropout),
    "a counter": Case(Counts),
    "losses kept": Case(Remembers),
    "logs": Case(Logs),
    "regression": Case(Regresses),
    "reconstruction": Case(Reconstructs),
    "scaling on transfer": Case(ScalesOnTransfer),
    "layer and group normalisation": Case(Normalised),
    "two losses": Case(TwoLosses),
    "label smoothing": Case(Smoothed),
    "attention within an example": Case(Attention),
    "augmentation in collate_fn": Case(Net, "", {"collate_fn": flipped}),
    "augmentation in the data set": Case(Net, "", {"dataset": Jittered}),
    "batches of one": Case(Net, "", {"dataset": lambda: examples(4)}),
    "shuffled": Case(Net, "", {"shuffle": True}),
}
