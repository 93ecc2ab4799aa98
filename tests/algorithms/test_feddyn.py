from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_fl.algorithms import FedDyn, FedProx
from lightning_fl.types import Aggregate
from tests.helpers.federation import Simulation, quadratics

PARAMS = {"x": torch.tensor([10.0], dtype=torch.float64)}
CENTERS, STEEPNESS = (0.0, 1.0, 4.0), (1.0, 2.0, 0.5)
OPTIMUM = 8 / 7


def exact(algorithm: FedDyn | FedProx, pull: float, num_clients: int = 3) -> Simulation:
    """A federation whose clients solve their local problem exactly, by one Newton step."""
    centers = [CENTERS[client % 3] + client // 3 for client in range(num_clients)]
    steepness = [STEEPNESS[client % 3] for client in range(num_clients)]
    return Simulation(algorithm, quadratics(centers, steepness), PARAMS, lr=[1 / (h + pull) for h in steepness])


def test_the_first_rounds_are_the_known_ones() -> None:
    federation = exact(FedDyn(alpha=1.0), 1.0)
    for expected in (1.3333333333, 0.8888888889, 0.8395061728):
        assert federation.rounds(1) == pytest.approx(expected, abs=1e-9)


def test_the_first_round_goes_twice_as_far_as_fedprox() -> None:
    assert exact(FedDyn(alpha=0.5), 0.5).rounds(1) == pytest.approx(2 * exact(FedProx(0.5), 0.5).rounds(1) - 10.0)


@pytest.mark.parametrize(("alpha", "num_rounds"), [(0.1, 288), (1.0, 34), (10.0, 227)])
@pytest.mark.spread(1)
def test_it_reaches_the_optimum_in_the_known_number_of_rounds(alpha: float, num_rounds: int) -> None:
    federation = exact(FedDyn(alpha), alpha)
    distances = [abs(federation.rounds(1) - OPTIMUM) for _ in range(num_rounds)]
    assert distances[-2] > 1e-10 >= distances[-1]


def test_a_client_ends_with_its_own_gradient_where_it_ended() -> None:
    federation, own = exact(FedDyn(alpha=1.0), 1.0), [0.0] * 3
    for _ in range(4):
        start, before = federation.x, own
        federation.round()
        own = [federation.clients[client]["gradient"]["x"].item() for client in range(3)]
        ends = [start + old - new for old, new in zip(before, own, strict=True)]  # g_i falls by alpha (y_i - x)
        gradients = [h * (y - e) for h, y, e in zip(STEEPNESS, ends, CENTERS, strict=True)]
        assert own == pytest.approx(gradients, abs=1e-12)


def test_the_servers_gradient_is_the_mean_over_all_clients_also_with_sampling() -> None:
    federation, rng = exact(FedDyn(alpha=1.0), 1.0, num_clients=6), np.random.default_rng(0)
    for _ in range(20):
        federation.round(rng.choice(6, 2, replace=False).tolist())
        own = sum(state["gradient"]["x"].item() for state in federation.clients.values()) / 6
        assert federation.server["gradient"]["x"].item() == pytest.approx(own, abs=1e-12)


@pytest.mark.slow
def test_local_problems_that_are_not_solved_have_the_same_optimum() -> None:
    federation = Simulation(FedDyn(alpha=0.5), quadratics(CENTERS, STEEPNESS), PARAMS, num_steps=5)
    assert federation.rounds(300) == pytest.approx(OPTIMUM, abs=1e-9)


def test_weights_that_are_all_scaled_change_nothing() -> None:
    algorithm, delta = FedDyn(alpha=0.5), torch.tensor([3.0], dtype=torch.float64)
    moved = [
        algorithm.server_update(
            algorithm.server_init(PARAMS, 8), Aggregate({"x": factor * delta}, {}, factor * 2.0, {}, 2, 8)
        )
        for factor in (1.0, 7.0)
    ]
    assert moved[0]["params"]["x"].item() == pytest.approx(moved[1]["params"]["x"].item())
    assert moved[0]["gradient"]["x"].item() == pytest.approx(-0.5 * 3.0 / 8)


def test_no_pull_is_refused() -> None:
    with pytest.raises(ValueError, match=r"FedDyn got alpha=0\.0; expected a positive number"):
        FedDyn(alpha=0.0)
