"""A parameter that a step gives no gradient is corrected as if its gradient were 0, where an algorithm corrects."""

from __future__ import annotations

from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_fl as fl
from lightning_fl import FederatedStrategy
from lightning_fl.algorithms import Algorithm
from lightning_fl.datamodules import ClientLoaders
from tests.helpers.training import trainer


class Branches(L.LightningModule):
    """Examples of 1 pull ``a`` and ``b`` to places of their own, examples of -1 ``a`` only; -2 are skipped."""

    def __init__(self, is_dense: bool, make_optimizer: Any) -> None:
        super().__init__()
        self.a, self.b, self.unused = (nn.Parameter(torch.tensor(start)) for start in (1.0, 2.0, 3.0))
        self.is_dense, self.make_optimizer = is_dense, make_optimizer

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        (x,) = batch
        nothing = 0 * (self.a + self.b + self.unused)
        if x[0] == -2:
            return nothing if self.is_dense else None
        loss = (self.a - x[0]) ** 2
        if x[0] > 0:
            loss = loss + (self.b - 5) ** 2
        return loss + nothing if self.is_dense else loss

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.parameters())

    @property
    def values(self) -> list[float]:
        return [self.a.item(), self.b.item(), self.unused.item()]


def sgd(params: Any) -> Any:
    return torch.optim.SGD(params, lr=0.1)


CLIENTS = [1.0, -1.0, 1.0], [-1.0, -1.0, -1.0]
WITH_SKIPPED = [1.0, -2.0, -1.0, 1.0], [-2.0, -1.0, -1.0, -2.0]


def trained(
    algorithm: Algorithm, is_dense: bool, make_optimizer: Any = sgd, num_rounds: int = 4, clients: Any = CLIENTS
) -> list[float]:
    loaders = ClientLoaders([DataLoader(TensorDataset(torch.tensor(own))) for own in clients])
    module = Branches(is_dense, make_optimizer)
    trainer(FederatedStrategy(algorithm), num_rounds).fit(module, loaders)
    return module.values


@pytest.mark.parametrize(
    "algorithm",
    [
        fl.algorithms.Scaffold(),
        fl.algorithms.FedDyn(0.5),
        fl.algorithms.FedProx(0.5),
        fl.algorithms.MimeLite(),
        fl.algorithms.FedSGD(),
        fl.algorithms.Ditto(0.5),
        fl.algorithms.FedAMP(),
    ],
    ids=lambda algorithm: type(algorithm).__name__,
)
def test_a_missing_gradient_is_corrected_as_a_gradient_of_zero(algorithm: Algorithm) -> None:
    expected = trained(algorithm, is_dense=True)
    assert trained(algorithm, is_dense=False) == expected
    assert expected[1] != 2.0  # the branch of one client has learnt
    assert expected[2] == 3.0


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.parametrize("algorithm", [fl.algorithms.Scaffold(), fl.algorithms.FedDyn(0.5)], ids=["scaffold", "feddyn"])
def test_so_are_the_steps_of_skipped_batches(algorithm: Algorithm) -> None:
    expected = trained(algorithm, is_dense=True, clients=WITH_SKIPPED)
    assert trained(algorithm, is_dense=False, clients=WITH_SKIPPED) == expected


def test_scaffold_goes_on_learning_what_one_client_uses() -> None:
    module_b = trained(fl.algorithms.Scaffold(), is_dense=False, num_rounds=40)[1]
    assert module_b == pytest.approx(5.0, abs=1e-3)


@pytest.mark.parametrize(
    "algorithm",
    [fl.algorithms.FedAvg(), fl.algorithms.FedProx(0.0), fl.algorithms.FedSAM()],
    ids=lambda algorithm: type(algorithm).__name__,
)
def test_without_a_correction_the_optimizer_leaves_it_alone(algorithm: Algorithm) -> None:
    found = trained(algorithm, False, lambda params: torch.optim.SGD(params, lr=0.1, weight_decay=0.1))
    assert found[2] == 3.0


def test_a_parameter_that_a_phase_freezes_stays_where_it_is() -> None:
    class InParts(fl.algorithms.FedProx):
        def phases(self) -> Any:
            return (fl.types.Phase(trains=("a", "unused")),)

    found = trained(InParts(0.5), False, lambda params: torch.optim.SGD(params, lr=0.1, weight_decay=0.1))
    assert found[1] == 2.0
    assert found[2] != 3.0  # it is trained, with a gradient of 0 and so with weight decay
