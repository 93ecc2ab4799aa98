from __future__ import annotations

import pytest
import torch

from lightning_fl.algorithms import FedAvg, FedProx
from tests.helpers.federation import Simulation, quadratics

PARAMS = {"x": torch.tensor([10.0], dtype=torch.float64)}
CENTERS, STEEPNESS, WEIGHTS = (0.0, 1.0, 4.0), (1.0, 2.0, 0.5), (0.25, 0.5, 0.25)


def simulate(algorithm: FedAvg | FedProx, num_steps: int = 5, lr: float | list[float] = 0.1) -> Simulation:
    return Simulation(algorithm, quadratics(CENTERS, STEEPNESS), PARAMS, num_steps, lr, WEIGHTS)


@pytest.mark.parametrize(("mu", "expected"), [(0.1, 1.4362017804), (1.0, 1.2307692308), (10.0, 1.1100917431)])
@pytest.mark.spread(1)
def test_solved_exactly_it_settles_where_the_closed_form_says(mu: float, expected: float) -> None:
    newton = [1 / (h + mu) for h in STEEPNESS]  # one such step from the start minimises the proximal quadratic
    assert simulate(FedProx(mu), num_steps=1, lr=newton).rounds(300) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("mu", "expected"), [(0.1, 1.1358449779), (1.0, 1.1349830924)])
@pytest.mark.spread(1)
def test_with_five_steps_it_settles_where_the_closed_form_says(mu: float, expected: float) -> None:
    assert simulate(FedProx(mu)).rounds(100) == pytest.approx(expected, abs=1e-9)


def test_without_pull_it_is_federated_averaging() -> None:
    assert simulate(FedProx(mu=0.0)).rounds(5) == simulate(FedAvg()).rounds(5)
    assert simulate(FedProx(mu=0.1)).rounds(5) != simulate(FedAvg()).rounds(5)


def test_with_one_step_the_pull_does_nothing() -> None:
    assert simulate(FedProx(mu=7.0), num_steps=1).rounds(5) == simulate(FedAvg(), num_steps=1).rounds(5)


def test_the_pull_is_zero_at_the_start_also_in_16_bits() -> None:
    algorithm, start = FedProx(mu=1.0), torch.tensor([1 / 3])
    ctx = algorithm.client_init(algorithm.server_init({"x": start}, 1), None)
    grads = {"x": torch.tensor([0.5], dtype=torch.bfloat16)}
    pulled = algorithm.grad_transform(grads, {"x": start.bfloat16()}, ctx)
    assert torch.equal(pulled["x"], grads["x"])


def test_a_negative_pull_is_refused() -> None:
    with pytest.raises(ValueError, match=r"FedProx got mu=-0\.1; expected a number that is not negative"):
        FedProx(mu=-0.1)
