"""Mixing matrices and their known rates."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import lightning_fl as fl
from lightning_fl.topologies import (
    Complete,
    Edges,
    Exponential,
    Graph,
    Grid,
    Hypercube,
    Lazy,
    Path,
    Random,
    Ring,
    Star,
    Topology,
    Torus,
)

RATES: list[tuple[Topology, int, float]] = [
    (Ring(), 5, 0.5393446629),
    (Ring(), 8, 0.8047378541),
    (Ring(), 16, 0.9492530217),
    (Path(), 8, 0.9492530217),
    (Star(), 8, 0.875),
    (Torus(4, 4), 16, 0.6),
    (Grid(3, 3), 9, 0.7674234615),
    (Hypercube(), 8, 0.5),
    (Complete(), 7, 0.0),
    (Exponential(one_peer=True), 8, 0.0),
]
STOCHASTIC = [*RATES, (Exponential(), 6, 0.0), (Random(0.4), 6, 0.0), (Edges(2), 5, 0.0), (Lazy(Hypercube()), 8, 0.0)]


@pytest.mark.parametrize(("topology", "size", "rho"), RATES, ids=str)
def test_the_rate_is_the_known_one(topology: Topology, size: int, rho: float) -> None:
    assert topology.rho(size) == pytest.approx(rho, abs=1e-5 if rho == 0.0 else 1e-10)


@pytest.mark.parametrize(("topology", "size", "rho"), STOCHASTIC, ids=str)
@pytest.mark.parametrize("round", [0, 1, 2])
def test_rows_and_columns_add_up_to_1(topology: Topology, size: int, rho: float, round: int) -> None:
    matrix = topology.matrix(size, round)
    if not isinstance(topology, Edges):  # whose columns do with equal groups only
        torch.testing.assert_close(matrix.sum(0), torch.ones(size, dtype=torch.float64))
    torch.testing.assert_close(matrix.sum(1), torch.ones(size, dtype=torch.float64))
    assert (matrix >= 0).all()
    linked = topology.links(size, round) | torch.eye(size, dtype=torch.bool)
    assert ((matrix > 0) == linked).all()


def test_a_ring_forgets_at_the_known_speed() -> None:
    values, found = torch.arange(8.0).double(), []
    for _ in range(3):
        found.append(torch.linalg.vector_norm(values - 3.5).item())
        values = Ring().matrix(8) @ values
    assert found == pytest.approx([6.4807406984, 4.3461349368, 3.4029761847], rel=1e-10)


def test_one_peer_exponential_has_the_mean_after_three_rounds_of_eight() -> None:
    values = torch.randn(8, generator=torch.Generator().manual_seed(0)).double()
    mean = values.mean()
    for round in range(3):
        matrix = Exponential(one_peer=True).matrix(8, round)
        assert ((matrix > 0).sum(1) == 2).all()
        values = matrix @ values
    torch.testing.assert_close(values, mean.expand(8))


def push(topology: Topology, values: Tensor, rounds: int) -> Tensor:
    mass = torch.ones_like(values)
    for round in range(rounds):
        matrix = topology.push_matrix(len(values), round)
        values, mass = matrix @ values, matrix @ mass
    return values / mass


def test_push_sum_finds_the_mean_over_a_directed_graph() -> None:
    graph = Graph([*((node, (node + 1) % 5) for node in range(5)), (0, 2)], directed=True)
    values = torch.arange(5.0).double()
    assert push(graph, values, 1).tolist() == pytest.approx([2.4, 0.6, 1.125, 2.5, 3.5])
    assert push(graph, values, 200).tolist() == pytest.approx([2.0] * 5)
    with pytest.raises(ValueError, match="pushsum"):
        graph.matrix(5)


def test_a_random_graph_follows_from_seed_and_round() -> None:
    found = Random(0.5, seed=1).matrix(9, 3)
    assert torch.equal(found, Random(0.5, seed=1).matrix(9, 3))
    others = [Random(0.5, seed=1).matrix(9, 4), Random(0.5, seed=2).matrix(9, 3)]
    assert not any(torch.equal(found, other) for other in others)


def test_a_graph_that_falls_apart_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing from node 2 ever reaches node 0"):
        Graph([(0, 1), (2, 3)]).check(4)
    with pytest.raises(ValueError, match="nothing from node 1 ever reaches node 0"):
        Graph([(0, 1)], directed=True).check(2)
    for topology, size, _ in STOCHASTIC:
        topology.check(size)


def test_what_does_not_fit_is_refused() -> None:
    for topology, size, match in [
        (Torus(2, 3), 5, "6 nodes"),
        (Hypercube(), 6, "power of 2"),
        (Graph([(0, 9)]), 3, "0 to 2"),
        (Edges([[0, 1], [1, 2]]), 3, "once"),
        (Edges(4), 3, "1 to 3"),
    ]:
        with pytest.raises(ValueError, match=match):
            topology.matrix(size)
    for make in (lambda: Random(0.0), lambda: Edges(2, edge_rounds=0)):
        with pytest.raises(ValueError, match="expected"):
            make()


def test_they_are_public() -> None:
    assert fl.topologies.Ring() == Ring()
