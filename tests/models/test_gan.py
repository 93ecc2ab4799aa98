"""The generative network: both of its networks are averaged, and what is drawn is measured."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import lightning_fl as fl
from lightning_fl.models import GAN
from lightning_fl.models.gan import frechet_distance
from tests.helpers.training import trainer


class Changes(fl.callbacks.FederatedCallback):
    """What each client has changed, and its weight."""

    def __init__(self) -> None:
        self.own: list[tuple[float, dict[str, Tensor]]] = []

    def on_client_end(self, trainer: Any, module: Any, client: Any, run: Any, update: Any) -> None:
        self.own.append((run.weight, {name: delta.clone() for name, delta in update.delta.items()}))


def test_both_networks_are_averaged() -> None:
    module, seen = GAN(features=4, latent=2, hidden=8), Changes()
    before = {name: param.detach().clone() for name, param in module.named_parameters()}
    sets = [TensorDataset(torch.rand(size, 4)) for size in (8, 24)]
    clients = fl.datamodules.ClientLoaders({n: DataLoader(own, batch_size=8) for n, own in enumerate(sets)})
    fit = trainer("fedavg", callbacks=[seen])
    fit.fit(module, clients, DataLoader(sets[1], batch_size=24))
    (first, one), (second, other) = seen.own
    assert second == 3 * first
    for name, param in module.named_parameters():
        torch.testing.assert_close(param.detach(), before[name] + 0.25 * one[name] + 0.75 * other[name])
        assert one[name].abs().max() > 0
        assert not torch.equal(one[name], other[name])
    assert {name.partition(".")[0] for name in before} == {"generator", "discriminator"}
    drawn = module.draw(24, torch.Generator().manual_seed(0))
    assert drawn.min() > 0
    assert drawn.max() < 1
    expected = float(frechet_distance(sets[1].tensors[0], drawn.detach()))
    assert fit.callback_metrics["val_distance"].item() == pytest.approx(expected, rel=1e-5)


def test_the_distance_of_normal_distributions() -> None:
    one = torch.randn(50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    variance = float(one.var(0).sum())
    assert float(frechet_distance(one, one)) == pytest.approx(0, abs=1e-9)
    assert float(frechet_distance(one, one + torch.tensor([1.0, 0.0, 2.0]))) == pytest.approx(5)
    assert float(frechet_distance(one, one.mean(0) + 3 * (one - one.mean(0)))) == pytest.approx(4 * variance)
