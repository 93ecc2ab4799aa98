from __future__ import annotations

import pytest
import torch

from lightning_fl.algorithms import FedAvg, FedExP
from lightning_fl.types import LocalRun, Tree, Update
from tests.helpers.federation import Simulation, aggregate, quadratics

PARAMS: Tree = {"x": torch.zeros(2, dtype=torch.float64), "y": torch.zeros(1, dtype=torch.float64)}


def step_of(algorithm: FedExP, deltas: list[list[float]], weights: list[float]) -> list[float]:
    """Where the server goes from 0 with clients whose changes are ``deltas``."""
    server = algorithm.server_init(PARAMS, len(deltas))
    updates = []
    for (a, b, c), weight in zip(deltas, weights, strict=True):
        trained = {"x": torch.tensor([a, b]).double(), "y": torch.tensor([c]).double()}
        run = LocalRun(1, 1, weight, 0.0, {"x": 0.1, "y": 0.1})
        update, _ = algorithm.client_finish(trained, algorithm.client_init(server, None), None, run)
        updates.append(Update(update.delta, {}, weight, update.aux))
    params = algorithm.server_update(server, aggregate(updates, population=len(deltas)))["params"]
    return torch.cat([params["x"], params["y"]]).tolist()


def test_changes_that_point_apart_make_the_step_longer() -> None:
    deltas = [[3.0, 0.0, 0.0], [0.0, 3.0, 0.0], [0.0, 0.0, 3.0]]
    # mean (1, 1, 1), its square 3; the mean of the squares is 9
    assert step_of(FedExP(eps=1e-12), deltas, [1.0] * 3) == pytest.approx([1.5, 1.5, 1.5])
    assert step_of(FedExP(eps=1.0), deltas, [1.0] * 3) == pytest.approx([9 / 8] * 3)


def test_changes_that_agree_are_averaged() -> None:
    assert step_of(FedExP(), [[1.0, 2.0, 3.0]] * 2, [1.0, 1.0]) == [1.0, 2.0, 3.0]


def test_weights_count_in_both_means_and_their_scale_in_none() -> None:
    deltas = [[4.0, 0.0, 0.0], [0.0, 4.0, 0.0]]
    # mean (3, 1, 0), its square 10; the mean of the squares is 16
    deltas_expected = pytest.approx([3.0, 1.0, 0.0])
    assert step_of(FedExP(eps=1e-12), deltas, [3.0, 1.0]) == deltas_expected
    deltas = [[4.0, 0.0, 0.0], [-2.0, 0.0, 0.0]]
    # mean (2.5, 0, 0), its square 6.25; the mean of the squares is 13
    for factor in (1.0, 10.0):
        moved = step_of(FedExP(eps=1e-12), deltas, [3.0 * factor, factor])
        assert moved == pytest.approx([2.5 * 13 / 12.5, 0.0, 0.0])


def test_changes_that_cancel_do_not_blow_up() -> None:
    assert step_of(FedExP(), [[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0]], [1.0, 1.0]) == [0.0, 0.0, 0.0]


def test_with_infinite_eps_it_is_federated_averaging() -> None:
    gradients, params = quadratics((0.0, 1.0, 4.0), (1.0, 2.0, 0.5)), {"x": torch.tensor([10.0]).double()}
    federations = [Simulation(algorithm, gradients, params, 5) for algorithm in (FedExP(float("inf")), FedAvg())]
    assert federations[0].rounds(5) == pytest.approx(federations[1].rounds(5), rel=1e-12)


def test_no_eps_is_refused() -> None:
    with pytest.raises(ValueError, match="FedExP got eps=0; expected a positive number"):
        FedExP(eps=0)
