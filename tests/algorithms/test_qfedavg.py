from __future__ import annotations

import pytest
import torch

from lightning_fl.algorithms import QFedAvg
from lightning_fl.types import LocalRun, Tree, Update
from tests.helpers.federation import aggregate

PARAMS: Tree = {"x": torch.tensor([10.0, 0.0], dtype=torch.float64)}


def step_of(
    algorithm: QFedAvg, clients: list[tuple[float, list[float]]], weights: list[float], lr: float = 0.1
) -> list:
    """How the server moves with clients of these losses and changes, after two local steps each."""
    server = algorithm.server_init(PARAMS, len(clients))
    updates = []
    for (loss, change), weight in zip(clients, weights, strict=True):
        trained = {"x": PARAMS["x"] + torch.tensor(change).double()}
        run = LocalRun(2, 1, weight, 0.0, {"x": 2 * lr})
        ctx = algorithm.client_init(server, None, torch.tensor(loss, dtype=torch.float64))
        update, _ = algorithm.client_finish(trained, ctx, None, run)
        updates.append(Update(update.delta, {}, weight, update.aux))
    params = algorithm.server_update(server, aggregate(updates, population=len(clients)))["params"]
    return (params["x"] - PARAMS["x"]).tolist()


@pytest.mark.parametrize("q", [0.0, 0.5, 1.0, 2.0])
def test_the_step_is_the_papers(q: float) -> None:
    clients, lipschitz = [(4.0, [-1.0, 2.0]), (0.25, [3.0, 0.0])], 10.0
    # in the paper's notation: Delta w = L (x - y), Delta = F^q Delta w, h = q F^(q-1) |Delta w|^2 + L F^q
    total, divisor = [0.0, 0.0], 0.0
    for loss, change in clients:
        moved = [-lipschitz * c for c in change]
        total = [t + loss**q * m for t, m in zip(total, moved, strict=True)]
        divisor += q * loss ** (q - 1) * sum(m * m for m in moved) + lipschitz * loss**q
    expected = pytest.approx([-t / divisor for t in total], rel=1e-12)
    assert step_of(QFedAvg(q=q), clients, [1.0, 1.0]) == expected
    assert step_of(QFedAvg(q=q, lipschitz=lipschitz), clients, [1.0, 1.0], lr=0.3) == expected


def test_with_q_0_it_is_federated_averaging_by_examples() -> None:
    assert step_of(QFedAvg(q=0.0), [(4.0, [-1.0, 2.0]), (0.25, [3.0, 0.0])], [1.0, 3.0]) == [2.0, 0.5]


def test_the_larger_q_the_more_the_client_with_the_larger_loss_counts() -> None:
    clients = [(4.0, [-1.0, 0.0]), (0.25, [0.0, 1.0])]
    ratios = [-moved[0] / moved[1] for q in (0.0, 1.0, 2.0) if (moved := step_of(QFedAvg(q=q), clients, [1.0, 1.0]))]
    assert ratios == pytest.approx([1.0, 16.0, 256.0])


def test_the_scale_of_the_weights_does_not_matter() -> None:
    clients = [(4.0, [-1.0, 2.0]), (0.25, [3.0, 0.0])]
    assert step_of(QFedAvg(), clients, [1.0, 3.0]) == pytest.approx(step_of(QFedAvg(), clients, [10.0, 30.0]))


def test_clients_without_a_loss_or_a_step_move_nothing() -> None:
    assert step_of(QFedAvg(), [(0.0, [0.0, 0.0]), (0.0, [0.0, 0.0])], [1.0, 1.0]) == [0.0, 0.0]
    assert step_of(QFedAvg(q=0.5), [(0.0, [1.0, 0.0])], [1.0]) == pytest.approx([0.0, 0.0])
    assert step_of(QFedAvg(), [(1.0, [0.0, 0.0])], [1.0], lr=0.0) == [0.0, 0.0]


def test_a_negative_loss_is_refused() -> None:
    with pytest.raises(ValueError, match=r"negative loss -1\. Use a loss that is not negative"):
        step_of(QFedAvg(), [(-1.0, [1.0, 0.0])], [1.0])


@pytest.mark.parametrize("options", [{"q": -1.0}, {"lipschitz": 0.0}], ids=str)
def test_hyperparameters_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"QFedAvg got .*; expected"):
        QFedAvg(**options)
