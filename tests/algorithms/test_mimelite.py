from __future__ import annotations

import warnings
from functools import partial

import pytest
import torch
from torch.optim import SGD, Adam

from lightning_fl.algorithms import FedAvg, MimeLite
from tests.helpers.federation import Simulation, quadratics

PARAMS = {"x": torch.tensor([10.0], dtype=torch.float64)}
CENTERS, STEEPNESS, LR = (0.0, 1.0, 4.0), (1.0, 2.0, 0.5), 0.1


def reference(rounds: int, num_steps: int, beta1: float, beta2: float | None = None, tau: float = 1e-3) -> float:
    """MimeLite on the quadratics, written out for one number."""
    x, m, v = 10.0, 0.0, 0.0
    for _ in range(rounds):
        ends = []
        for e, h in zip(CENTERS, STEEPNESS, strict=True):
            y = x
            for _ in range(num_steps):
                step = (1 - beta1) * h * (y - e) + beta1 * m
                y -= LR * (step if beta2 is None else step / (v**0.5 + tau))
            ends.append(y)
        gradient = sum(h * (x - e) for e, h in zip(CENTERS, STEEPNESS, strict=True)) / 3
        m = (1 - beta1) * gradient + beta1 * m
        v = 0.0 if beta2 is None else (1 - beta2) * gradient**2 + beta2 * v
        x = sum(ends) / 3
    return x


@pytest.mark.parametrize("betas", [(0.9, None), (0.5, None), (0.9, 0.99), (0.0, 0.9)])
def test_it_takes_the_rounds_of_the_paper(betas: tuple[float, float | None]) -> None:
    algorithm = MimeLite(beta1=betas[0], beta2=betas[1], tau=0.5)
    federation = Simulation(algorithm, quadratics(CENTERS, STEEPNESS), PARAMS, num_steps=5)
    for rounds in range(1, 5):
        federation.round()
        assert federation.server["params"]["x"].item() == pytest.approx(reference(rounds, 5, *betas, 0.5), rel=1e-12)


def test_one_step_and_one_client_is_sgd_with_the_last_rounds_momentum() -> None:
    federation = Simulation(MimeLite(beta1=0.9), quadratics((0.0,), (1.0,)), PARAMS, num_steps=1)
    x, momentum = 10.0, 0.0
    for _ in range(6):
        federation.round()
        momentum = 0.1 * x + 0.9 * momentum
        x -= LR * momentum
        assert federation.server["params"]["x"].item() == pytest.approx(x, rel=1e-12)


def test_the_statistics_are_those_of_full_gradients_at_the_global_model_not_of_local_steps() -> None:
    federation = Simulation(
        MimeLite(beta1=0.5, beta2=0.5), quadratics(CENTERS, STEEPNESS), PARAMS, num_steps=7, lr=1e-3
    )
    federation.round()
    gradient = sum(h * (10.0 - e) for e, h in zip(CENTERS, STEEPNESS, strict=True)) / 3
    assert federation.server["momentum"]["x"].item() == pytest.approx(0.5 * gradient, rel=1e-12)
    assert federation.server["square"]["x"].item() == pytest.approx(0.5 * gradient**2, rel=1e-12)


def test_without_momentum_it_is_federated_averaging() -> None:
    federations = [Simulation(a, quadratics(CENTERS, STEEPNESS), PARAMS, 5) for a in (MimeLite(beta1=0.0), FedAvg())]
    for _ in range(5):
        for federation in federations:
            federation.round()
    assert torch.equal(*(federation.server["params"]["x"] for federation in federations))


@pytest.mark.parametrize("options", [{"beta1": 1.0}, {"beta1": -0.1}, {"beta2": 1.0}, {"tau": 0.0}], ids=str)
def test_hyperparameters_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"MimeLite got .*; expected"):
        MimeLite(**options)


def test_momentum_of_the_local_optimizer_is_warned_of() -> None:
    param = torch.nn.Parameter(torch.ones(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MimeLite().check_optimizers([SGD([param], lr=0.1)])
    for make in (partial(SGD, momentum=0.9), Adam):
        with pytest.warns(
            UserWarning, match=r"applies the server's momentum and scaling, but found .*without momentum"
        ):
            MimeLite().check_optimizers([make([param], lr=0.1)])
