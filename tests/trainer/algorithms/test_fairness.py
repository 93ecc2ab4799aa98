"""Algorithms and rules for fairness: known answers on quadratics and small rows."""

from __future__ import annotations

import pytest
import torch

import lightning_fl as fl
from lightning_fl import FederatedStrategy
from lightning_fl.aggregation.robust.fedmgda import shortest_mixture
from lightning_fl.algorithms import AFL, TERM
from lightning_fl.algorithms.afl import onto_simplex
from lightning_fl.types import Aggregate, LocalRun
from tests.helpers.training import Quadratic, minimise, quadratic_clients, trainer

E, H = torch.tensor([0.0, 1.0, 4.0]).double(), torch.tensor([1.0, 2.0, 0.5]).double()


def losses(x: float) -> torch.Tensor:
    return 0.5 * H * (x - E) ** 2


@pytest.mark.parametrize(
    ("t", "optimum"), [(0.1, 1.2029136519), (1.0, 1.5024899988), (5.0, 1.6334902025), (-1.0, 3.9957563237)]
)
def test_term_stays_at_its_optimum(t: float, optimum: float) -> None:
    module = Quadratic(optimum)
    trainer(FederatedStrategy(TERM(t=t), local_steps=1, weighting="uniform"), 2).fit(module, quadratic_clients())
    assert module.x.item() == pytest.approx(optimum, rel=1e-9)
    assert (torch.softmax(t * losses(optimum), 0) * H * (optimum - E)).sum().item() == pytest.approx(0.0, abs=1e-8)


@pytest.mark.parametrize("t", [0.2, 1.0, -1.0])
def test_the_first_step_of_term_is_its_formula(t: float) -> None:
    """Although the losses are 50, 81 and 9, and nobody knows yet what to take the exponents relative to."""
    found = minimise(FederatedStrategy(TERM(t=t), local_steps=1, weighting="uniform"), 1)
    expected = (torch.softmax(t * losses(10.0), 0) * 0.1 * H * (10.0 - E)).sum().item()
    assert 10.0 - found == pytest.approx(expected, rel=1e-9)


def test_after_cut_exponents_term_knows_what_they_are_relative_to() -> None:
    algorithm, run = TERM(t=1.0), LocalRun(1, 1, 1.0, 0.0, {})
    server = algorithm.server_init({"x": torch.zeros(1)}, 2)  # float32 holds exponents up to 88
    updates = []
    for loss in (500.0, 503.0):
        ctx = algorithm.client_init(server, None, torch.tensor(loss, dtype=torch.float64))
        updates.append(algorithm.client_finish({"x": torch.ones(1)}, ctx, None, run)[0])
    aux = {k: {n: sum(u.aux[k][n] for u in updates) for n in own} for k, own in updates[0].aux.items()}
    total = Aggregate({"x": updates[0].delta["x"] + updates[1].delta["x"]}, {}, 2.0, aux, 2, 2)
    state = algorithm.server_update(server, total)
    assert state["params"]["x"].item() == pytest.approx(1.0)
    assert state["shift"].item() == pytest.approx(501.5)


def test_term_bears_losses_whose_exponentials_overflow() -> None:
    module = Quadratic(1000.0)
    trainer(FederatedStrategy(TERM(t=1.0), local_steps=20, weighting="uniform"), 8).fit(module, quadratic_clients())
    assert 0.5 < module.x.item() < 3.0


def test_afl_takes_the_known_first_rounds() -> None:
    found = [minimise(FederatedStrategy(AFL(mixture_lr=0.05), local_steps=1), rounds) for rounds in (1, 2, 3)]
    assert found == pytest.approx([8.9666666667, 7.3733333333, 6.0986666667], rel=1e-9)


def test_afl_stays_at_its_saddle_point() -> None:
    x, mixture = 1.6568542494923802, torch.tensor([0.4142135623730951, 0.0, 0.5857864376269049], dtype=torch.float64)
    assert losses(x).max().item() == pytest.approx(1.3725830020, rel=1e-9)
    change = (-0.1 * mixture * H * (x - E)).sum()
    aux = {"mixture": {"sum": mixture.sum()}, "losses": {"of_each": losses(x)}}
    aggregate = Aggregate({"x": change[None]}, {}, 3.0, aux, 3, 3)
    state = AFL(mixture_lr=0.05).server_update(
        {"params": {"x": torch.tensor([x], dtype=torch.float64)}, "mixture": mixture}, aggregate
    )
    assert state["params"]["x"].item() == pytest.approx(x, rel=1e-12)
    assert state["mixture"].tolist() == pytest.approx(mixture.tolist(), abs=1e-9)


def test_the_simplex_is_met_at_the_nearest_point() -> None:
    assert onto_simplex(torch.tensor([0.2, 0.3, 0.5])).tolist() == pytest.approx([0.2, 0.3, 0.5])
    assert onto_simplex(torch.tensor([2.0, 0.0, 0.0])).tolist() == [1.0, 0.0, 0.0]
    assert onto_simplex(torch.tensor([0.5, 0.5, -1.0])).tolist() == pytest.approx([0.5, 0.5, 0.0])


def test_fedmgda_finds_the_known_mixture() -> None:
    rows = torch.tensor([[2.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 3.0, 4.0]]).double()
    unit = rows / rows.norm(dim=1, keepdim=True)
    assert shortest_mixture(unit @ unit.t(), 1.0).tolist() == pytest.approx([4 / 9, 5 / 18, 5 / 18], abs=1e-9)
    assert shortest_mixture(unit @ unit.t(), 0.0).tolist() == pytest.approx([1 / 3] * 3)
    near = shortest_mixture(unit @ unit.t(), 0.05)
    assert near.tolist() == pytest.approx([1 / 3 + 0.05, 1 / 3 - 0.025, 1 / 3 - 0.025], abs=1e-9)


def test_fedmgda_lets_nobody_lose() -> None:
    """Two clients that pull one way outvote the third in a mean; the shortest mixture is downhill for all."""
    clients = quadratic_clients(e=(0.0, 0.0, 4.0), h=(1.0, 1.0, 1.0), sizes=(1, 1, 1))
    aggregator = fl.aggregation.FedMGDA(epsilon=1.0, step=0.7)
    found = minimise(FederatedStrategy(aggregator=aggregator, local_steps=1), 11, clients)
    assert 0 < found < 4  # between the two optima every move is somebody's loss
    before = minimise(FederatedStrategy(aggregator=aggregator, local_steps=1), 10, clients)
    assert found == pytest.approx(before, abs=1e-9)
    with pytest.raises(ValueError, match="epsilon"):
        fl.aggregation.FedMGDA(epsilon=2.0)
