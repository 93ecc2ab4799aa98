"""Closed-form answers, through the real Trainer."""

from __future__ import annotations

import pytest
import torch

import lightning_fl as fl
from lightning_fl import FederatedStrategy
from tests.helpers.training import Plain, Quadratic, image_clients, minimise, quadratic_clients, trainer, weights

CENTERS, STEEPNESS, LR = torch.tensor([0.0, 1.0, 4.0]).double(), torch.tensor([1.0, 2.0, 0.5]).double(), 0.1


@pytest.mark.parametrize(
    ("local_steps", "rounds", "fixed_point"),
    [(1, 200, 1.0909090909), (2, 100, 1.1017369727), (5, 45, 1.1359075905), (20, 20, 1.2991578746)],
)
@pytest.mark.spread(1)
def test_fedavg_converges_to_its_biased_fixed_point(local_steps: int, rounds: int, fixed_point: float) -> None:
    strategy = FederatedStrategy("fedavg", local_steps=local_steps)
    assert minimise(strategy, rounds) == pytest.approx(fixed_point, rel=1e-8)


@pytest.mark.slow
def test_fedavg_with_uneven_local_work_has_the_bias_that_fednova_removes() -> None:
    shares = torch.tensor([1.0, 2.0, 5.0]).double()
    fixed_point = minimise(
        FederatedStrategy("fedavg", weighting="uniform"),
        rounds=100,
        clients=uneven_clients(),
    )
    assert fixed_point == pytest.approx(expected_uneven(shares), rel=1e-8)


def uneven_clients() -> fl.datamodules.ClientDatasets:
    clients = quadratic_clients(h=(1.0, 1.0, 1.0), sizes=(1, 2, 5))
    clients.batch_size = 1
    return clients


def expected_uneven(num_steps: torch.Tensor) -> float:
    pull = 1 - (1 - LR) ** num_steps
    return float((pull * CENTERS).sum() / pull.sum())


@pytest.mark.parametrize("rounds_and_x", [(1, 6.1655685417), (2, 3.8237355799), (3, 2.5316874018)])
def test_scaffold_takes_the_known_first_rounds(rounds_and_x: tuple[int, float]) -> None:
    rounds, x = rounds_and_x
    assert minimise(FederatedStrategy("scaffold", local_steps=5), rounds) == pytest.approx(x, rel=1e-9)


@pytest.mark.parametrize(("local_steps", "rounds"), [(1, 204), (5, 37), (20, 52)])
@pytest.mark.spread(1)
def test_scaffold_reaches_the_optimum_in_the_known_number_of_rounds(local_steps: int, rounds: int) -> None:
    distances = [
        abs(minimise(FederatedStrategy("scaffold", local_steps=local_steps), last) - 8 / 7)
        for last in (rounds - 2, rounds)
    ]
    assert distances[0] > 1e-10 > distances[1]


@pytest.mark.slow
def test_scaffold_ends_with_the_clients_gradients_as_controls() -> None:
    strategy = FederatedStrategy("scaffold", local_steps=5)
    minimise(strategy, rounds=60)
    rounds = strategy.active_driver
    controls = [rounds.store.get(client)["algorithm"]["control"]["x"].item() for client in range(3)]
    assert controls == pytest.approx((STEEPNESS * (8 / 7 - CENTERS)).tolist(), abs=1e-8)
    assert rounds.state.server["control"]["x"].item() == pytest.approx(0.0, abs=1e-8)


def test_scaffold_starts_as_fedavg_with_uniform_weights() -> None:
    fedavg = minimise(FederatedStrategy("fedavg", weighting="uniform", local_steps=5), rounds=1)
    assert minimise(FederatedStrategy("scaffold", local_steps=5), rounds=1) == pytest.approx(fedavg, rel=1e-12)


def test_scaffold_is_fedavg_when_clients_are_identical() -> None:
    def same() -> fl.datamodules.ClientDatasets:
        return quadratic_clients(e=(2.0, 2.0, 2.0), h=(1.0, 1.0, 1.0))

    fedavg = minimise(FederatedStrategy("fedavg", local_steps=5), 4, same())
    assert minimise(FederatedStrategy("scaffold", local_steps=5), 4, same()) == pytest.approx(fedavg, rel=1e-12)


def test_scaffold_with_one_local_step_is_gradient_descent() -> None:
    x = 10.0
    for _ in range(5):
        x -= LR * float((STEEPNESS * (x - CENTERS)).mean())
    assert minimise(FederatedStrategy("scaffold", local_steps=1), rounds=5) == pytest.approx(x, rel=1e-12)


def test_scaffold_server_control_is_the_mean_over_all_clients_with_sampling() -> None:
    for rounds in (1, 2, 5):
        strategy = FederatedStrategy("scaffold", local_steps=3, clients_per_round=2, seed=3)
        minimise(strategy, rounds)
        active = strategy.active_driver
        states = [active.store.get(client) for client in range(3)]
        controls = [0.0 if state is None else state["algorithm"]["control"]["x"].item() for state in states]
        assert active.state.server["control"]["x"].item() == pytest.approx(sum(controls) / 3, abs=1e-12)


def test_one_full_batch_step_of_all_clients_is_one_centralised_step() -> None:
    clients = image_clients((5, 7, 23), batch_size=None)
    federated, central = Plain(), Plain()
    trainer("fedavg").fit(federated, clients)
    trainer("auto").fit(central, clients)
    torch.testing.assert_close(weights(federated), weights(central), rtol=1e-10, atol=1e-12)


def test_a_client_without_data_and_one_that_does_not_learn_change_nothing() -> None:
    without = minimise("fedavg", 5)
    clients = quadratic_clients(e=(0.0, 1.0, 4.0, 7.0), h=(1.0, 2.0, 0.5, 1.0), sizes=(1, 2, 1, 0))
    with pytest.warns(UserWarning, match="Client 3 has no data"):
        x = minimise("fedavg", 5, clients)
    assert x == without
    assert minimise("fedavg", 5, lr=0.0) == 10.0


def test_permuting_clients_changes_nothing() -> None:
    e, h, sizes = (0.0, 1.0, 4.0), (1.0, 2.0, 0.5), (1, 2, 1)
    permuted = quadratic_clients(e[::-1], h[::-1], sizes[::-1])
    for algorithm in ("fedavg", "scaffold"):
        x, permuted_x = (
            minimise(FederatedStrategy(algorithm, local_steps=3), 5, clients) for clients in (None, permuted)
        )
        assert permuted_x == pytest.approx(x, rel=1e-12)


def test_weights_that_add_up_to_nothing_are_refused() -> None:
    module = Quadratic()
    with pytest.warns(UserWarning, match="has no data"), pytest.raises(ValueError, match="add up to 0"):
        trainer("fedavg").fit(module, quadratic_clients(sizes=(0, 0, 0)))
    assert module.x.item() == 10.0
