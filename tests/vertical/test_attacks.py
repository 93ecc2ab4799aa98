"""What a party could find out from what it receives, and what the protection does; the figures of the docs' table."""

from __future__ import annotations

import os
from typing import Any

import lightning as L
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lightning_fl.vertical import GradientNoise, Party, VerticalStrategy, aligned_loader


def rare(positives: float = 0.1, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows, and a label that few of them have."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2000, 10, generator=generator)
    score = x[:, 0] + 0.5 * torch.randn(2000, generator=generator)
    return x, (score >= score.quantile(1 - positives)).float()


def gradients(positives: float = 0.1, steps: int = 20, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Gradients of the activations that a party without labels receives, and the labels, in a training like theirs."""
    x, y = rare(positives, seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        bottom, top = nn.Sequential(nn.Linear(10, 8), nn.Tanh()), nn.Linear(8, 1)
    optimizer = torch.optim.SGD([*bottom.parameters(), *top.parameters()], 0.5)
    for _ in range(steps):
        h = bottom(x)
        h.retain_grad()
        optimizer.zero_grad()
        nn.functional.binary_cross_entropy_with_logits(top(h)[:, 0], y).backward()
        optimizer.step()
    assert h.grad is not None
    return h.grad, y


def norm_attack(gradient: Tensor, y: Tensor) -> float:
    """How well the length of a row's gradient tells its label, as the area under the ROC curve."""
    return float(roc_auc_score(y, gradient.norm(dim=1)))


def test_the_length_of_gradients_tells_rare_labels() -> None:
    assert norm_attack(*gradients()) > 0.9


def test_noise_hides_them() -> None:
    gradient, y = gradients()
    assert norm_attack(GradientNoise()(gradient), y) < 0.6
    # The negative control: too little noise hides nothing.
    assert norm_attack(GradientNoise(0.01)(gradient), y) > 0.9


class Half(Party):
    """One half of the columns; the labels, of which few are 1, are with party 0."""

    def __init__(self, has_labels: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.bottom = nn.Sequential(nn.Linear(5, 8), nn.Tanh())
        self.top = nn.Linear(16, 1) if has_labels else None
        self.received: list[Tensor] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        h = self.bottom(batch[0])
        if not self.has_labels:
            h.register_hook(self.received.append)  # what comes back for the activations that it has sent
        parts = self.exchange(h)
        if not self.has_labels:
            return parts
        return nn.functional.binary_cross_entropy_with_logits(self.top(torch.cat(parts, 1))[:, 0], batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.5)


def attacked(protection: GradientNoise | None) -> float:
    """How well party 1 tells the labels by the lengths of the gradients that it receives in training."""
    rank, (x, y) = int(os.environ["RANK"]), rare()
    part = Half(rank == 0)
    tensors = [x[:, rank * 5 : rank * 5 + 5], *([] if rank else [y])]
    trainer = L.Trainer(
        strategy=VerticalStrategy(protection=protection),
        max_epochs=10,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(part, aligned_loader(TensorDataset(*tensors), range(2000), 2000))
    return norm_attack(part.received[-1], y) if rank else 0.0


@pytest.mark.parametrize(("protection", "low", "high"), [(None, 0.9, 1.0), (GradientNoise(), 0.4, 0.6)])
def test_a_party_in_training(run_ranks: Any, protection: GradientNoise | None, low: float, high: float) -> None:
    assert low < run_ranks(2, attacked, protection)[1] <= high


def test_noise_leaves_the_gradient_right_on_average() -> None:
    gradient, _ = gradients()
    noisy = torch.stack([GradientNoise()(gradient) for _ in range(200)])
    spread = 4.0 * gradient.norm(dim=1).max() / 8**0.5
    assert noisy.std() == pytest.approx(float((spread**2 + gradient.var()) ** 0.5), rel=0.05)
    assert float((noisy.mean(0) - gradient).abs().max()) < 5 * spread / 200**0.5


def test_the_scale_has_to_be_positive() -> None:
    with pytest.raises(ValueError, match="positive"):
        GradientNoise(0.0)


def inversion(width: int, shuffled: bool = False) -> float:
    """The share of the columns' variance that activations tell whoever knows a few hundred rows of both."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1000, 10, generator=generator)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        h = nn.Sequential(nn.Linear(10, width), nn.Tanh())(x).detach()
    known, rest = slice(0, 300), slice(300, 1000)
    design = torch.cat([h, torch.ones(1000, 1)], 1)
    answers = x[known][torch.randperm(300, generator=generator)] if shuffled else x[known]
    weights = torch.linalg.lstsq(design[known], answers).solution
    return float(1 - (design[rest] @ weights - x[rest]).square().sum() / (x[rest] - x[rest].mean(0)).square().sum())


def test_wide_activations_tell_the_columns() -> None:
    assert inversion(16) > 0.9
    assert 0.5 < inversion(8) < inversion(16)
    assert inversion(1) < 0.15
    assert inversion(16, shuffled=True) < 0.05  # the negative control: without known rows nothing is told
