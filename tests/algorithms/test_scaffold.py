from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from lightning_fl.algorithms import FedAvg, Scaffold
from lightning_fl.tree import add
from lightning_fl.types import Aggregate, LocalRun, State
from tests.helpers.federation import Simulation, quadratics

PARAMS = {"x": torch.tensor([10.0], dtype=torch.float64)}
CENTERS, STEEPNESS = (0.0, 1.0, 4.0), (1.0, 2.0, 0.5)
OPTIMUM = 8 / 7


def simulate(algorithm: Scaffold | FedAvg, num_steps: int = 5, num_clients: int = 3) -> Simulation:
    centers = [CENTERS[client % 3] + client // 3 for client in range(num_clients)]
    gradients = quadratics(centers, [STEEPNESS[client % 3] for client in range(num_clients)])
    return Simulation(algorithm, gradients, PARAMS, num_steps)


def x_of(federation: Simulation) -> float:
    return federation.server["params"]["x"].item()


def controls(federation: Simulation) -> tuple[float, float]:
    """The server's control, and the mean of those of all clients."""
    own = [state["control"]["x"].item() for state in federation.clients.values()]
    return federation.server["control"]["x"].item(), sum(own) / len(federation.gradients)


def rounds_with_sampling(algorithm: Scaffold) -> list[tuple[float, float]]:
    federation = simulate(algorithm, num_clients=6)
    rng = np.random.default_rng(0)
    both = []
    for _ in range(20):
        federation.round(rng.choice(6, 2, replace=False).tolist())
        both.append(controls(federation))
    return both


def test_the_first_rounds_are_the_known_ones() -> None:
    federation = simulate(Scaffold())
    for expected in (6.1655685417, 3.8237355799, 2.5316874018):
        federation.round()
        assert x_of(federation) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("num_steps", "num_rounds"), [(1, 204), (5, 37), (20, 52)])
@pytest.mark.spread(1)
def test_it_reaches_the_optimum_whatever_the_number_of_local_steps(num_steps: int, num_rounds: int) -> None:
    federation = simulate(Scaffold(), num_steps)
    for _ in range(num_rounds - 1):
        federation.round()
    assert abs(x_of(federation) - OPTIMUM) > 1e-10
    federation.round()
    assert abs(x_of(federation) - OPTIMUM) <= 1e-10


def test_at_the_optimum_the_controls_are_the_clients_gradients() -> None:
    federation = simulate(Scaffold())
    for _ in range(100):
        federation.round()
    assert federation.server["control"]["x"].item() == pytest.approx(0.0, abs=1e-12)
    for client, state in federation.clients.items():
        gradient = STEEPNESS[client] * (OPTIMUM - CENTERS[client])
        assert state["control"]["x"].item() == pytest.approx(gradient, abs=1e-12)


def test_the_first_round_is_federated_averaging_with_equal_weights() -> None:
    scaffold, fedavg = simulate(Scaffold()), simulate(FedAvg())
    scaffold.round()
    fedavg.round()
    assert x_of(scaffold) == pytest.approx(x_of(fedavg), rel=1e-12)
    scaffold.round()
    fedavg.round()
    assert x_of(scaffold) != pytest.approx(x_of(fedavg), rel=1e-3)


def test_identical_clients_are_federated_averaging_in_every_round() -> None:
    gradients = quadratics([1.0] * 3, [2.0] * 3)
    scaffold, fedavg = (Simulation(algorithm, gradients, PARAMS, num_steps=5) for algorithm in (Scaffold(), FedAvg()))
    for _ in range(10):
        scaffold.round()
        fedavg.round()
        assert x_of(scaffold) == pytest.approx(x_of(fedavg), rel=1e-12)


def test_one_step_of_all_clients_is_gradient_descent() -> None:
    federation, x = simulate(Scaffold(), num_steps=1), 10.0
    for _ in range(10):
        federation.round()
        x -= 0.1 * sum(h * (x - e) for h, e in zip(STEEPNESS, CENTERS, strict=True)) / 3
        assert x_of(federation) == pytest.approx(x, rel=1e-12)


def test_the_servers_control_is_the_mean_of_all_clients_controls_also_with_sampling() -> None:
    for server, clients in rounds_with_sampling(Scaffold()):
        assert server == pytest.approx(clients, abs=1e-12)


@dataclass(frozen=True)
class DividesByTheCohort(Scaffold):
    def server_update(self, server: State, aggregate: Aggregate) -> State:
        control = add(server["control"], aggregate.aux["control"], alpha=1 / aggregate.num_clients)
        return {**super().server_update(server, aggregate), "control": control}


@dataclass(frozen=True)
class ForgetsItsClients(Scaffold):
    def client_init(self, server: State, client: State | None, probe: object = None) -> State:
        return super().client_init(server, None)


@pytest.mark.parametrize(
    "broken", [DividesByTheCohort(), ForgetsItsClients()], ids=lambda broken: type(broken).__name__
)
def test_a_broken_control_breaks_the_mean(broken: Scaffold) -> None:
    assert any(abs(server - clients) > 1e-3 for server, clients in rounds_with_sampling(broken))


def test_the_control_is_the_mean_gradient_over_the_learning_rates_really_taken() -> None:
    algorithm = Scaffold()
    ctx = algorithm.client_init(algorithm.server_init(PARAMS, 3), None)
    run = LocalRun(num_steps=2, num_examples=1, weight=1.0, loss=0.0, lr_sum={"x": 0.1 + 0.3})
    _, state = algorithm.client_finish({"x": PARAMS["x"] - 0.1 * 5.0 - 0.3 * 5.0}, ctx, None, run)
    assert state is not None
    assert state["control"]["x"].item() == pytest.approx(5.0)


@pytest.mark.parametrize("client", [None, {"control": {"x": torch.tensor([2.5], dtype=torch.float64)}}])
def test_a_client_that_took_no_step_keeps_its_control(client: State | None) -> None:
    algorithm = Scaffold()
    ctx = algorithm.client_init(algorithm.server_init(PARAMS, 3), client)
    run = LocalRun(num_steps=0, num_examples=1, weight=1.0, loss=0.0, lr_sum={"x": 0.0})
    update, state = algorithm.client_finish(dict(PARAMS), ctx, client, run)
    assert state is not None
    assert state["control"]["x"].tolist() == ([2.5] if client else [0.0])
    assert (update.delta["x"].item(), update.aux["control"]["x"].item()) == (0.0, 0.0)


def test_every_client_weighs_the_same_and_keeps_state() -> None:
    assert Scaffold.weighting == "uniform"
    assert Scaffold.keeps_client_state


@pytest.mark.parametrize("num_steps", [1, 5, 20])
@pytest.mark.spread(1)
def test_option_1_renews_the_control_by_the_gradient_at_the_global_model(num_steps: int) -> None:
    federation = simulate(Scaffold(option=1), num_steps)
    x, control, own = 10.0, 0.0, [0.0] * 3
    for _ in range(4):
        federation.round()
        ends = []
        for e, h, c in zip(CENTERS, STEEPNESS, own, strict=True):
            y = x
            for _ in range(num_steps):
                y -= 0.1 * (h * (y - e) - c + control)
            ends.append(y)
        own = [h * (x - e) for e, h in zip(CENTERS, STEEPNESS, strict=True)]
        x, control = sum(ends) / 3, sum(own) / 3
        assert x_of(federation) == pytest.approx(x, rel=1e-12)
        assert controls(federation) == pytest.approx((control, control), rel=1e-12)
    for _ in range(250):
        federation.round()
    assert x_of(federation) == pytest.approx(OPTIMUM, rel=1e-9)


def test_option_1_keeps_the_mean_with_sampling_and_takes_any_optimizer() -> None:
    for server, clients in rounds_with_sampling(Scaffold(option=1)):
        assert server == pytest.approx(clients, abs=1e-12)
    Scaffold(option=1).check_optimizers([torch.optim.Adam([PARAM])])


PARAM = torch.nn.Parameter(torch.ones(1))


def test_optimizers_whose_steps_are_no_gradients_are_warned_of() -> None:
    Scaffold().check_optimizers([torch.optim.SGD([PARAM], momentum=0.9)])
    with pytest.warns(UserWarning, match=r"derived for plain SGD, found SGD, Adam: .*Use torch\.optim\.SGD"):
        Scaffold().check_optimizers([torch.optim.SGD([PARAM]), torch.optim.Adam([PARAM])])


@pytest.mark.parametrize("option", [0, 3])
def test_another_option_is_refused(option: int) -> None:
    with pytest.raises(ValueError, match=f"option={option}; expected 1 or 2"):
        Scaffold(option=option)
