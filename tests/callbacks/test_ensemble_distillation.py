"""FedDF: the scores of the clients' models, distilled into their mean."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax
from torch.utils.data import DataLoader, TensorDataset

import lightning_fl as fl
from lightning_fl import FederatedStrategy
from lightning_fl.callbacks import EnsembleDistillation
from lightning_fl.datamodules import IID, ClientDatasets, DigitsDataModule, PartitionedDataModule
from tests.helpers.training import trainer, weights

PUBLIC = torch.randn(12, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Linear(L.LightningModule):
    """Scores by one layer; the gradient of a client's loss does not depend on the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4, bias=False, dtype=torch.float64)
        nn.init.zeros_(self.layer.weight)
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("offset", torch.zeros(4, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.layer(x)) + self.offset

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (direction,) = batch
        self.offset += direction[0, :, 0]
        return -(self.layer.weight * direction[0]).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1.0)


def directions() -> list[Tensor]:
    return [torch.randn(1, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in (2, 3, 4)]


def clients() -> ClientDatasets:
    return ClientDatasets([TensorDataset(own) for own in directions()], batch_size=1)


def distil(
    module: Linear, rounds: int = 1, own: EnsembleDistillation | None = None, data: Any = None, **options: Any
) -> Linear:
    public = DataLoader(TensorDataset(PUBLIC, torch.zeros(12)), batch_size=5)
    callback = own or EnsembleDistillation(public, steps=300, lr=0.05, batch_size=12)
    fit = trainer(FederatedStrategy(**options), rounds, callbacks=[callback], limit_val_batches=0)
    fit.fit(module, data or clients())
    return module


def divergence(module: Linear, targets: Tensor) -> float:
    module.eval()
    with torch.no_grad():
        return float(kl_div(log_softmax(module(PUBLIC), 1), targets, reduction="batchmean"))


def ensemble() -> Tensor:
    """What the clients' models answer together; a client's weights are its direction."""
    scores = [PUBLIC @ own[0].T + own[0, :, 0] for own in directions()]
    found: Tensor = torch.stack(scores).mean(0).softmax(1)
    return found


class Squared(Linear):
    """Scores that are no linear function of the weights, so that the mean model is not the ensemble."""

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) ** 2 + self.offset


def test_the_global_model_answers_as_the_clients_do_together() -> None:
    scores = [(PUBLIC @ own[0].T) ** 2 + own[0, :, 0] for own in directions()]
    targets = torch.stack(scores).mean(0).softmax(1)
    plain = Squared()
    trainer(FederatedStrategy(), 1, limit_val_batches=0).fit(plain, clients())
    distilled = distil(Squared())
    assert divergence(distilled, targets) < 0.2 * divergence(plain, targets)
    assert torch.equal(distilled.offset, plain.offset)  # buffers stay the mean's


def test_where_scores_are_linear_the_mean_is_the_ensemble_and_stays() -> None:
    """The mean of linear models gives the mean of their scores, at which the divergence and its gradient are zero."""
    mean = torch.stack(directions()).mean(0)[0]
    assert divergence(distil(Linear()), ensemble()) == pytest.approx(0, abs=1e-12)
    # Adam's first step is as long as its learning rate whatever the gradient, so rounding moves it a little.
    still = distil(Linear(), own=EnsembleDistillation([PUBLIC], steps=1, lr=1e-9))
    torch.testing.assert_close(still.layer.weight.detach(), mean, rtol=0, atol=1e-8)


def distilled() -> Tensor:
    return weights(distil(Squared(), rounds=2))


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_distil_what_one_does(run_ranks: Any, world_size: int) -> None:
    expected = distilled()
    for found in run_ranks(world_size, distilled):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_public_data_are_nobodys() -> None:
    data = DigitsDataModule(public_share=0.3, val_share=0.2)
    whole = PartitionedDataModule(data, IID(), num_clients=3)
    whole.setup("fit")
    parts = [whole.train_dataloader(), whole.public_dataloader(), whole.val_dataloader()]
    rows = [{tuple(x.flatten().tolist()) for x, _ in loader.dataset} for loader in parts[1:]]
    held = [{tuple(x.flatten().tolist()) for x, _ in parts[0][client].dataset} for client in parts[0]]
    assert len(rows[0]) == round(0.3 * 1150)
    assert not rows[0] & rows[1]
    assert all(not rows[0] & own for own in held)
    with pytest.raises(ValueError, match="public_share"):
        PartitionedDataModule(DigitsDataModule(), IID()).public_dataloader()
    with pytest.raises(ValueError, match="public_share=1"):
        DigitsDataModule(public_share=1)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"transforms": [fl.privacy.ClientLevelDP(1.0, 1.0)]}, "exact figures of single clients"),
        ({"aggregator": fl.privacy.SecureAggregation()}, "SecureAggregation hides them"),
        ({"algorithm": "dsgd"}, "DSGD has a model for each client"),
        ({"personal": ["layer.*"]}, "clients keep layer"),
        ({"schedule": fl.schedules.Buffered(1), "durations": fl.clients.Lognormal(1)}, "different rounds"),
    ],
)
def test_where_no_one_may_see_the_models_it_is_refused(options: Any, match: str) -> None:
    with pytest.raises(MisconfigurationException, match=match):
        distil(Linear(), **options)


class OneScore(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, :1]


def test_what_is_wrong_is_said() -> None:
    with pytest.raises(ValueError, match="steps=0"):
        EnsembleDistillation(steps=0)
    with pytest.raises(MisconfigurationException, match="no batches of tensors"):
        distil(Linear(), own=EnsembleDistillation())
    with pytest.raises(MisconfigurationException, match=r"forward returns \[1, 1\] for one input"):
        distil(OneScore())
