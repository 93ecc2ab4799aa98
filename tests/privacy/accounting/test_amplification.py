"""What amplification by sampling rests on: a client's update does not depend on who else takes part."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import lightning_fl as fl
from lightning_fl import FederatedStrategy
from lightning_fl.clients import Between, ParticipationSampler, Stragglers
from lightning_fl.privacy import ClientLevelDP
from tests.helpers.training import trainer, weights

CLIP, NUM_CLIENTS = 0.1, 12


class Net(L.LightningModule):
    """A network that drops units out in training."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.5)


def clients_of(num_clients: int) -> fl.datamodules.ClientDatasets:
    generator = torch.Generator().manual_seed(1)
    datasets = [
        TensorDataset(
            torch.randn(12, 4, generator=generator) + client % 3, torch.randint(3, (12,), generator=generator)
        )
        for client in range(num_clients)
    ]
    return fl.datamodules.ClientDatasets(datasets, batch_size=4)


def total(monkeypatch: pytest.MonkeyPatch, cohort: list[int], dropout: float = 0.0, **options: Any) -> Tensor:
    """The sum of a cohort's clipped updates, without noise."""
    monkeypatch.setattr(ParticipationSampler, "_secure_positions", lambda self, round: list(cohort))
    module, transform = Net(dropout), ClientLevelDP(clip=CLIP, noise_multiplier=0.0, method="rdp")
    strategy = FederatedStrategy("fedavg", cohort=fl.clients.Poisson(0.5), transforms=[transform], seed=0, **options)
    before = weights(module)
    trainer(strategy, 1).fit(module, clients_of(NUM_CLIENTS))
    return (weights(module) - before) * (0.5 * NUM_CLIENTS)


@pytest.mark.parametrize(
    "options",
    [
        {"local_epochs": Between(1, 9)},
        {"local_steps": Between(1, 9)},
        {"stragglers": Stragglers(0.5, policy="drop")},
        {"stragglers": Stragglers(0.9), "local_epochs": 5},
        {"engine": "sequential", "dropout": 0.5},
    ],
)
def test_one_client_more_moves_the_sum_by_the_clip_at_most(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    others = list(range(1, NUM_CLIENTS))
    moved = total(monkeypatch, [0, *others], **options) - total(monkeypatch, others, **options)
    assert float(moved.norm()) <= CLIP * (1 + 1e-4)


def test_work_drawn_for_the_cohort_as_a_whole_would_move_it_further(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        ParticipationSampler,
        "_each",
        lambda self, cohort, round, _, draw: list(draw(cohort, fl.clients.round_rng(0, round, ""))),
    )
    with pytest.raises(AssertionError):
        test_one_client_more_moves_the_sum_by_the_clip_at_most(monkeypatch, {"local_epochs": Between(1, 9)})


def test_steps_with_random_numbers_do_not_train_together(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MisconfigurationException, match="random"):
        total(monkeypatch, [0, 1, 2], dropout=0.5, engine="vectorized")
    alone = total(monkeypatch, [0, 1, 2], dropout=0.5, engine="sequential")
    assert torch.equal(total(monkeypatch, [0, 1, 2], dropout=0.5, engine="auto"), alone)


def test_a_full_cohort_of_stragglers_may_all_be_dropped() -> None:
    transform = ClientLevelDP(clip=CLIP, noise_multiplier=1.0, method="rdp")
    strategy = FederatedStrategy("fedavg", transforms=[transform], stragglers=Stragglers(0.9, policy="drop"), seed=1)
    trainer(strategy, 6).fit(Net(), clients_of(2))
    dropped = [len(entry["dropped"]) for entry in strategy.history]
    assert len(dropped) == 6
    assert 2 in dropped
