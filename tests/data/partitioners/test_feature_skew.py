from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_fl.data.partitioners.feature_skew import FeatureNoise
from lightning_fl.data.partitioners.natural import NaturalColumn
from lightning_fl.data.partitioners.partitioner import IID
from lightning_fl.data.splitting import partition_loader

DATA = TensorDataset(torch.zeros(400, 100), torch.arange(400) % 2)


def noise_of(clients: object, client: int) -> torch.Tensor:
    return torch.cat([x for x, _ in clients[client]])  # type: ignore[index]


def test_the_variance_of_the_noise_grows_with_the_client() -> None:
    clients = partition_loader(DataLoader(DATA, batch_size=50), FeatureNoise(0.4), 4)
    variances = torch.tensor([noise_of(clients, client).var() for client in range(4)])
    assert torch.allclose(variances, torch.tensor([0.1, 0.2, 0.3, 0.4]), rtol=0.06)


def test_a_sample_has_the_same_noise_whenever_it_is_read_and_another_with_another_seed() -> None:
    loader = DataLoader(DATA, batch_size=50)
    first, again, other = (noise_of(partition_loader(loader, FeatureNoise(0.4), 4, seed), 2) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_samples_are_split_as_the_partitioner_inside_says() -> None:
    assert all(map(torch.equal, FeatureNoise(0.4)(DATA, 4, 7), IID()(DATA, 4, 7)))
    noisy = FeatureNoise(0.4, NaturalColumn(1))
    assert noisy.names_clients
    assert noisy.client_ids(DATA) == [0, 1]


def test_samples_that_take_no_noise_are_refused() -> None:
    clients = partition_loader(DataLoader(TensorDataset(torch.arange(8))), FeatureNoise(0.4), 2)
    with pytest.raises(ValueError, match="expected a tuple or list whose first entry is a float tensor"):
        next(iter(clients[0]))
