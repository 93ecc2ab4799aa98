"""Closed-form answers of the algorithms beyond FedAvg and SCAFFOLD, through the real Trainer."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch.optim import SGD, Adam, AdamW
from torch.utils.data import DataLoader, TensorDataset

import lightning_fl as fl
from lightning_fl import FederatedStrategy
from lightning_fl.algorithms import Algorithm, DiLoCo, FedAvgM, FedDyn, FedNova, FedOpt, FedProx
from tests.helpers.training import Plain, Quadratic, image_clients, loader, minimise, trainer, weights

CENTERS, STEEPNESS = (0.0, 1.0, 4.0), (1.0, 2.0, 0.5)


def uneven_clients(steepness: tuple[float, ...]) -> fl.datamodules.ClientLoaders:
    """Clients of 10, 20 and 10 examples that take 1, 2 and 5 steps a pass."""
    loaders = [
        DataLoader(TensorDataset(torch.full((n,), e).double(), torch.full((n,), h).double()), batch_size=n // num_steps)
        for e, h, n, num_steps in zip(CENTERS, steepness, (10, 20, 10), (1, 2, 5), strict=True)
    ]
    return fl.datamodules.ClientLoaders(loaders)


@pytest.mark.parametrize(
    ("algorithm", "steepness", "fixed_point"),
    [
        ("fedavg", (1.0, 1.0, 1.0), 2.2687097398),
        ("fednova", (1.0, 1.0, 1.0), 1.3917860081),
        ("fedavg", STEEPNESS, 1.5530937145),
        ("fednova", STEEPNESS, 1.0707211776),
    ],
)
@pytest.mark.spread(1)
def test_fednova_takes_back_most_of_the_bias_of_uneven_work(
    algorithm: str, steepness: tuple[float, ...], fixed_point: float
) -> None:
    assert minimise(algorithm, 110, uneven_clients(steepness)) == pytest.approx(fixed_point, rel=1e-8)


class Runs(fl.callbacks.FederatedCallback):
    def __init__(self) -> None:
        self.normalizers: list[float | None] = []

    def on_client_end(self, trainer: Any, module: Any, client: Any, run: Any, update: Any) -> None:
        self.normalizers.append(run.normalizer)


class Moving(Quadratic):
    def __init__(self, make_optimizer: Any) -> None:
        super().__init__()
        self.make_optimizer = make_optimizer

    def configure_optimizers(self) -> Any:
        return self.make_optimizer(self.parameters())


def test_local_training_is_measured_for_fednova() -> None:
    runs = Runs()
    trainer("fednova", callbacks=[runs]).fit(Moving(partial(SGD, lr=0.1, momentum=0.9)), uneven_clients(STEEPNESS))
    assert runs.normalizers == pytest.approx([1.0, 2.9, 13.1441])


def test_fednova_with_momentum_normalises_by_what_momentum_does() -> None:
    module, x = Moving(partial(SGD, lr=0.1, momentum=0.9)), 10.0
    trainer("fednova").fit(module, uneven_clients(STEEPNESS))
    change = work = 0.0
    for e, h, p, num_steps in zip(CENTERS, STEEPNESS, (0.25, 0.5, 0.25), (1, 2, 5), strict=True):
        y, velocity, a = x, 0.0, sum((1 - 0.9**k) / 0.1 for k in range(1, num_steps + 1))
        for _ in range(num_steps):
            velocity = 0.9 * velocity + h * (y - e)
            y -= 0.1 * velocity
        change, work = change + p * (y - x) / a, work + p * a
    assert module.x.item() == pytest.approx(x + work * change, rel=1e-12)


def test_fednova_refuses_what_it_cannot_measure() -> None:
    with pytest.raises(ValueError, match="unknown for Adam"):
        trainer("fednova").fit(Moving(partial(Adam, lr=0.1)), uneven_clients(STEEPNESS))
    with pytest.raises(ValueError, match="client_optimizer='reset' with momentum"):
        trainer(FederatedStrategy("fednova", client_optimizer="keep"), 2).fit(
            Moving(partial(SGD, lr=0.1, momentum=0.9)), uneven_clients(STEEPNESS)
        )


@pytest.mark.slow
def test_fednova_is_right_with_even_weights() -> None:
    found = minimise(FederatedStrategy("fednova", weighting="uniform"), 110, uneven_clients((1.0, 1.0, 1.0)))
    pull = [(1 - 0.9**num_steps) / num_steps for num_steps in (1, 2, 5)]
    assert found == pytest.approx(sum(s * e for s, e in zip(pull, CENTERS, strict=True)) / sum(pull), rel=1e-8)


def test_fednova_with_equal_steps_is_federated_averaging() -> None:
    found, expected = (minimise(FederatedStrategy(name, local_steps=5), 5) for name in ("fednova", "fedavg"))
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("mu", "fixed_point"), [(0.1, 1.1358449779), (1.0, 1.1349830924)])
@pytest.mark.spread(1)
def test_fedprox_converges_to_its_fixed_point(mu: float, fixed_point: float) -> None:
    assert minimise(FederatedStrategy(FedProx(mu), local_steps=5), 60) == pytest.approx(fixed_point, rel=1e-8)


def test_fedprox_with_one_step_is_federated_averaging() -> None:
    found, expected = (minimise(FederatedStrategy(a, local_steps=1), 5) for a in (FedProx(mu=7.0), "fedavg"))
    assert found == expected


def test_fedprox_holds_clients_near_the_start() -> None:
    start, moved = weights(Plain()), []
    for mu in (0.0, 5.0):
        module = Plain()
        trainer(FederatedStrategy(FedProx(mu))).fit(module, image_clients((5, 7, 11)))
        moved.append((weights(module) - start).norm())
    assert moved[1] < 0.9 * moved[0]


def test_feddyn_takes_the_known_first_rounds() -> None:
    for rounds, x in ((1, 1.3333333333), (2, 0.8888888889), (3, 0.8395061728)):
        strategy = FederatedStrategy(FedDyn(alpha=1.0), local_steps=40)
        assert minimise(strategy, rounds, lr=0.5) == pytest.approx(x, rel=1e-9)


@pytest.mark.slow
def test_feddyn_ends_with_the_clients_gradients() -> None:
    strategy = FederatedStrategy(FedDyn(alpha=1.0), local_steps=20)
    assert minimise(strategy, 36, lr=0.5) == pytest.approx(8 / 7, rel=1e-9)
    store = strategy.active_driver.store
    gradients = [store.get(client)["algorithm"]["gradient"]["x"].item() for client in range(3)]
    expected = [h * (8 / 7 - e) for e, h in zip(CENTERS, STEEPNESS, strict=True)]
    assert gradients == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("nesterov", [False, True])
def test_fedavgm_takes_the_steps_of_gradient_descent_with_momentum(nesterov: bool) -> None:
    x = torch.nn.Parameter(torch.tensor(10.0).double())
    optimizer = SGD([x], lr=0.1, momentum=0.9, nesterov=nesterov)
    for _ in range(4):
        slopes = [p * h * (x - e) for e, h, p in zip(CENTERS, STEEPNESS, (0.25, 0.5, 0.25), strict=True)]
        x.grad = sum(slopes).detach()
        optimizer.step()
    algorithm = FedAvgM(momentum=0.9, nesterov=nesterov)
    assert minimise(FederatedStrategy(algorithm, local_steps=1), 4) == pytest.approx(x.item(), rel=1e-12)


@pytest.mark.parametrize("algorithm", [FedOpt(), FedOpt(partial(SGD, lr=1.0))], ids=["default", "SGD"])
def test_fedopt_with_sgd_is_federated_averaging(algorithm: Algorithm) -> None:
    assert minimise(FederatedStrategy(algorithm, local_steps=5), 5) == minimise(
        FederatedStrategy("fedavg", local_steps=5), 5
    )


def test_diloco_with_a_plain_outer_step_is_federated_averaging() -> None:
    algorithm = DiLoCo(server_lr=1.0, momentum=0.0)
    found = minimise(FederatedStrategy(algorithm, local_steps=7), 3)
    assert found == minimise(FederatedStrategy("fedavg", local_steps=7, weighting="uniform"), 3)


def test_diloco_with_one_replica_and_a_plain_outer_step_is_plain_adamw() -> None:
    strategy = FederatedStrategy(DiLoCo(server_lr=1.0, momentum=0.0), num_clients=1, client_optimizer="keep")
    replica, plain = (Plain(make_optimizer=partial(AdamW, lr=0.01)) for _ in range(2))
    trainer(strategy, 4).fit(replica, loader())
    trainer("auto", 4).fit(plain, loader())
    torch.testing.assert_close(weights(replica), weights(plain), rtol=1e-10, atol=1e-12)


def test_the_server_step_of_fedexp_is_the_one_of_the_paper() -> None:
    deltas = [-0.1 * h * (10.0 - e) for e, h in zip(CENTERS, STEEPNESS, strict=True)]
    mean, eps = sum(deltas) / 3, 1e-3
    step = max(1.0, sum(delta**2 for delta in deltas) / (2 * 3 * (mean**2 + eps)))
    found = minimise(FederatedStrategy(fl.algorithms.FedExP(eps), local_steps=1), 1)
    assert found == pytest.approx(10.0 + step * mean, rel=1e-12)


@pytest.mark.parametrize("algorithm", [FedNova(), FedNova(mu=0.5)], ids=str)
def test_a_learning_rate_of_zero_moves_nothing(algorithm: Algorithm) -> None:
    assert minimise(FederatedStrategy(algorithm), 2, lr=0.0) == 10.0


@pytest.mark.slow
def test_scaffold_option_1_reaches_the_optimum() -> None:
    strategy = FederatedStrategy(fl.algorithms.Scaffold(option=1), local_steps=5)
    assert minimise(strategy, 80) == pytest.approx(8 / 7, rel=1e-9)
    control = strategy.active_driver.store.get(2)["algorithm"]["control"]["x"].item()
    assert control == pytest.approx(0.5 * (8 / 7 - 4.0), abs=1e-8)


@pytest.mark.slow
def test_qfedavg_evens_out_the_clients_losses() -> None:
    """Tends to the point where the largest loss is smallest, as q grows: h (x - e)^2 / 2 equal for clients 1 and 2."""
    largest = []
    for q in (0.0, 1.0, 5.0):
        x = minimise(FederatedStrategy(fl.algorithms.QFedAvg(q=q), local_steps=5), 150)
        largest.append(max(h * (x - e) ** 2 / 2 for e, h in zip(CENTERS, STEEPNESS, strict=True)))
    assert largest == sorted(largest, reverse=True)
    assert largest[2] < 0.7 * largest[0]
