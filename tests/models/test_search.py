"""The network that looks for its own layers: both optimizers' tensors are averaged."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import lightning_fl as fl
from lightning_fl.models import ArchitectureSearch
from tests.helpers.training import trainer


def part(seed: int, size: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(size, 4, generator=generator), torch.arange(size) % 3)


def module() -> ArchitectureSearch:
    torch.manual_seed(0)
    return ArchitectureSearch(in_features=4, width=5, depth=2, num_classes=3, momentum=0.0)


def trained(own: ArchitectureSearch, data: TensorDataset, strategy: object = "auto") -> dict[str, Tensor]:
    trainer(strategy, limit_val_batches=0).fit(own, DataLoader(data, batch_size=len(data)), DataLoader(data))
    return {name: param.detach() for name, param in own.named_parameters()}


def test_weights_and_choices_are_averaged() -> None:
    start, parts = module(), [part(0, 8), part(1, 24)]
    before = {name: param.detach().clone() for name, param in start.named_parameters()}
    alone = [trained(deepcopy(start), data) for data in parts]
    clients = fl.datamodules.ClientLoaders({n: DataLoader(data, batch_size=len(data)) for n, data in enumerate(parts)})
    trainer("fedavg", limit_val_batches=0).fit(start, clients, DataLoader(parts[0]))
    for name, param in start.named_parameters():
        torch.testing.assert_close(param.detach(), 0.25 * alone[0][name] + 0.75 * alone[1][name])
        assert not torch.equal(param.detach(), before[name])
    assert {name.rpartition(".")[2] for name in before} == {"weight", "bias", "alpha"}


def test_it_has_the_size_that_the_docs_say() -> None:
    assert sum(param.numel() for param in ArchitectureSearch().parameters()) == 8_754


def test_it_tells_what_it_has_found() -> None:
    own = module()
    with torch.no_grad():
        for layer, best in zip((own.net[2], own.net[3]), (3, 1), strict=True):
            layer.alpha[best] = 20.0
    assert own.architecture() == ["skip", "tanh"]
    x = torch.randn(6, 5)
    assert own.net[2](x).tolist() == [pytest.approx(row, abs=1e-6) for row in x.tolist()]
