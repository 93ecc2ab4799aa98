from __future__ import annotations

import resource
import time

import numpy as np
import pytest
import torch

from lightning_fl.datamodules import SyntheticDataModule


def features(data: SyntheticDataModule, client: int) -> torch.Tensor:
    return torch.cat([data.client_dataset(client, part)[:][0] for part in ("train", "test")])


def whole(**options: object) -> SyntheticDataModule:
    return SyntheticDataModule(**{"test_share": 0.0, **options})


def test_sizes_are_lognormal_plus_fifty() -> None:
    data = whole(num_clients=4000)
    logs = np.log([data.num_samples(client) - 49.5 for client in data.client_ids])
    assert abs(logs.mean() - 4) < 4 * 2 / 4000**0.5
    assert abs(logs.std() - 2) < 4 * 2 / (2 * 4000) ** 0.5


def test_features_have_the_covariance_of_the_paper() -> None:
    data = whole(num_clients=1, max_size=20_000, seed=5)
    data.setup()
    data._sizes[:] = 20_000
    x = features(data, 0)
    assert torch.allclose(x.var(0), torch.arange(1, 61).float() ** -1.2, rtol=0.06)


@pytest.mark.parametrize("beta", [0.0, 1.0, 4.0])
def test_the_centres_of_clients_spread_by_beta(beta: float) -> None:
    data = whole(alpha=0.0, beta=beta, num_clients=400, max_size=200)
    means = torch.stack([features(data, client).mean() for client in data.client_ids])
    expected = beta + 1 / 60  # B_k, and the mean of 60 entries of v_k
    assert abs(means.var().item() / expected - 1) < 4 * (2 / 400) ** 0.5 + 0.03


@pytest.mark.parametrize(("alpha", "iid"), [(0.0, True), (1.0, False)])
def test_iid_clients_share_one_model_and_others_do_not(alpha: float, iid: bool) -> None:
    data = whole(alpha=alpha, beta=0.0, iid=iid, num_clients=30, max_size=300)
    histograms = torch.stack(
        [
            torch.bincount(data.client_dataset(client)[:][1], minlength=10) / data.num_samples(client)
            for client in range(30)
        ]
    )
    distance = (histograms - histograms.mean(0)).abs().sum(1).mean()
    assert (distance < 0.45) == iid


def test_a_client_is_the_same_whenever_it_is_asked_for_and_however_many_there_are() -> None:
    few, many = whole(num_clients=5), whole(num_clients=500)
    for client in range(5):
        assert torch.equal(features(few, client), features(many, client))
    assert not torch.equal(features(few, 1)[:50], features(few, 2)[:50])
    assert not torch.equal(features(few, 1)[:50], features(whole(num_clients=5, seed=1), 1)[:50])


def test_a_million_clients_are_enumerable() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    data = SyntheticDataModule(num_clients=1_000_000)
    data.setup("fit")
    clients = data.train_dataloader()
    assert len(clients) == sum(1 for _ in clients) == 1_000_000
    x, y = next(iter(clients[999_999]))
    assert (x.shape, y.shape) == ((10, 60), (10,))
    assert time.process_time() - start < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


@pytest.mark.parametrize(
    "options", [{"alpha": -1}, {"beta": -1}, {"num_clients": 0}, {"num_classes": 1}, {"max_size": 0}]
)
def test_arguments_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be at least"):
        SyntheticDataModule(**options)
