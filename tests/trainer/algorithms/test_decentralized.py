"""Training without a centre: known answers on quadratics, by plain recursions and through the real Trainer."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

import lightning_fl as fl
from lightning_fl import FederatedStrategy
from lightning_fl.algorithms import D2, DSGD, Decentralized, FedAvg, GradientTracking, PushSum
from lightning_fl.topologies import (
    Complete,
    Cyclic,
    Edges,
    Exponential,
    Graph,
    Hypercube,
    Lazy,
    Path,
    Random,
    Ring,
    Star,
    Swarm,
    Topology,
)
from lightning_fl.types import Aggregate
from tests.helpers.training import Plain, Quadratic, image_clients, minimise, quadratic_clients, trainer, weights

E = (0.0, 1.0, 4.0, -2.0, 2.0)
H = (1.0, 2.0, 0.5, 1.0, 3.0)
SIZES = (10, 30, 20, 25, 15)
OPTIMUM = 1.0666666667
GROUPS = [[0, 1, 2], [3, 4]]


def five(sizes: Sequence[int] = (1,) * 5) -> fl.datamodules.ClientDatasets:
    return quadratic_clients(E, H, sizes)


def nodes_of(strategy: FederatedStrategy) -> list[float]:
    nodes: list[float] = strategy.active_driver.state.server["nodes"]["x"].flatten().tolist()
    return nodes


def simulate(algorithm: Decentralized, rounds: int, local_steps: int, sizes: Sequence[float] = (1,) * 5) -> Tensor:
    """The nodes after some rounds, with the closed form of local training."""
    e, h, p = (torch.tensor(values, dtype=torch.float64) for values in (E, H, sizes))
    p = p / p.sum()
    state = algorithm.server_init({"x": torch.full((1,), 10.0).double()}, 5)
    for _ in range(rounds):
        x = state["nodes"]["x"][:, 0]
        deltas = {"x": ((e - x) * (1 - (1 - 0.1 * h) ** local_steps))[:, None]}
        state = algorithm.server_update(state, Aggregate({}, {}, 1.0, {}, 5, 5, nodes=deltas, node_weights=p))
    found: Tensor = state["nodes"]["x"][:, 0]
    torch.testing.assert_close(state["params"]["x"][0], p @ found)
    return found


def test_a_ring_settles_near_the_optimum_and_the_corrected_ones_at_it() -> None:
    ring = Ring()
    expected = [1.1387256931, 1.0764188768, 0.9929141106, 1.0825986948, 1.0431269344]
    found = simulate(DSGD(ring), 250, local_steps=1)
    assert found.tolist() == pytest.approx(expected, rel=1e-9)
    assert found.mean().item() == pytest.approx(1.0667568619, rel=1e-9)
    assert simulate(DSGD(ring), 60, local_steps=5).mean().item() == pytest.approx(0.9584121916, rel=1e-9)
    for algorithm in (D2(ring), GradientTracking(ring)):
        assert simulate(algorithm, 400, local_steps=1).tolist() == pytest.approx([OPTIMUM] * 5, rel=1e-9)


@pytest.mark.parametrize(("edge_rounds", "limit"), [(1, 0.8299946911), (2, 0.8465903437), (5, 0.8700197168)])
def test_hierarchical_averaging_settles_where_it_is_known_to(edge_rounds: int, limit: float) -> None:
    algorithm = DSGD(Edges(GROUPS, edge_rounds))
    found = simulate(algorithm, 40 * edge_rounds, 5, SIZES)
    assert found.tolist() == pytest.approx([limit] * 5, rel=1e-9)
    between = simulate(algorithm, 40 * edge_rounds + 1, 5, SIZES)
    assert len({round(own, 12) for own in between.tolist()}) == (2 if edge_rounds > 1 else 1)


def test_edges_that_never_meet_settle_apart() -> None:
    found = simulate(DSGD(Edges(GROUPS, 10**6)), 300, 5, SIZES)
    mean = float(found @ torch.tensor(SIZES).double() / sum(SIZES))
    assert mean == pytest.approx(0.8764610914, rel=1e-9)


ON_A_GRAPH: list[tuple[Decentralized, int, Sequence[int]]] = [
    (DSGD(Ring()), 1, (1,) * 5),
    (DSGD(Path()), 5, (1,) * 5),
    (DSGD(Random(0.4)), 2, (1,) * 5),
    (D2(Ring()), 1, (1,) * 5),
    (GradientTracking(Ring()), 5, (1,) * 5),
    (PushSum(Graph([*((n, (n + 1) % 5) for n in range(5)), (0, 2)], directed=True)), 2, (1,) * 5),
    (DSGD(Exponential(one_peer=True)), 1, (1,) * 5),
]


@pytest.mark.parametrize(("algorithm", "local_steps", "sizes"), ON_A_GRAPH, ids=str)
@pytest.mark.parametrize("engine", ["sequential", "vectorized"])
@pytest.mark.spread(5)
def test_the_trainer_does_what_the_recursion_says(
    algorithm: Decentralized, local_steps: int, sizes: Sequence[int], engine: str
) -> None:
    strategy = FederatedStrategy(algorithm, local_steps=local_steps, engine=engine)
    x = minimise(strategy, 3, five(sizes))
    expected = simulate(algorithm, 3, local_steps, sizes)
    assert nodes_of(strategy) == pytest.approx(expected.tolist(), rel=1e-12)
    assert x == pytest.approx(expected.mean().item(), rel=1e-12)  # what validation and checkpoints see
    consensus = (expected - expected.mean()).square().mean().sqrt().item()
    assert strategy.history[-1]["consensus"] == pytest.approx(consensus, rel=1e-9)


@pytest.mark.parametrize("name", ["dsgd", "d2", "gradienttracking"])
def test_the_first_round_is_the_known_one(name: str) -> None:
    strategy = FederatedStrategy(name, topology=Ring(), local_steps=1)
    minimise(strategy, 1, five())
    expected = [8.2666666667, 8.9666666667, 8.9, 8.7, 8.4666666667]
    assert nodes_of(strategy) == pytest.approx(expected, rel=1e-9)
    assert strategy.history[-1]["rho"] == pytest.approx(0.5393446629, rel=1e-9)


@pytest.mark.parametrize("topology", [Edges(GROUPS, 2), Ring()], ids=str)
def test_federated_averaging_takes_a_topology_with_its_own_weights(topology: Topology) -> None:
    strategy = FederatedStrategy("fedavg", topology=topology, local_steps=5)
    minimise(strategy, 3, five(SIZES))
    expected = simulate(DSGD(topology), 3, 5, SIZES)
    assert nodes_of(strategy) == pytest.approx(expected.tolist(), rel=1e-12)


@pytest.mark.parametrize("name", ["fedavg", "dsgd", "d2", "gradienttracking", "pushsum"])
def test_a_complete_graph_is_federated_averaging(name: str) -> None:
    found = []
    for topology in (Complete(), None):
        module, algorithm = Plain(), name if topology else "fedavg"
        weighting = "examples" if name == "fedavg" else "uniform"
        strategy = FederatedStrategy(algorithm, topology=topology, weighting=weighting, engine="sequential")
        trainer(strategy, 3).fit(module, image_clients((5, 7, 23)))
        found.append(weights(module))
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-12)


def test_a_ring_is_not_federated_averaging() -> None:
    assert minimise(FederatedStrategy("dsgd", topology=Ring(), local_steps=5), 3, five()) != pytest.approx(
        minimise(FederatedStrategy("fedavg", weighting="uniform", local_steps=5), 3, five()), rel=1e-4
    )


@pytest.mark.parametrize(("topology", "limit"), [(Cyclic(), 1.6927927427), (Cyclic(reverse=True), 0.6055573538)])
def test_a_model_that_goes_round_settles_where_it_is_known_to(topology: Topology, limit: float) -> None:
    found = minimise(FederatedStrategy(topology=topology, local_steps=5), 25, five())
    # The known number is that after the last client of the order.
    assert found == pytest.approx(limit, rel=1e-7)


def test_the_elected_are_not_always_the_same() -> None:
    chosen = [Swarm().elected(5, round) for round in range(50)]
    assert set(chosen) == set(range(5))
    assert chosen != [Swarm(seed=1).elected(5, round) for round in range(50)]
    assert set(Swarm().edges(5, 3)) == {(node, chosen[3]) for node in range(5) if node != chosen[3]}


def swarm(algorithm: str, topology: Topology | None) -> tuple[Tensor, list[Any]]:
    module, strategy = Plain(), FederatedStrategy(algorithm, topology=topology)
    trainer(strategy, 3).fit(module, image_clients((1, 7, 23, 5)))
    return weights(module), [entry.get("elected") for entry in strategy.history]


@pytest.mark.parametrize(
    ("algorithm", "world_size"),
    [
        ("fedavg", 1),
        ("fedavg", 2),
        pytest.param("scaffold", 1, marks=pytest.mark.slow),
        pytest.param("scaffold", 2, marks=pytest.mark.slow),
        pytest.param("fedavg", 4, marks=pytest.mark.slow),
    ],
)
def test_a_swarm_trains_what_a_server_does(run_ranks: Any, algorithm: str, world_size: int) -> None:
    expected, _ = swarm(algorithm, None)
    elected = [Swarm().elected(4, round) for round in range(3)]
    found = run_ranks(world_size, swarm, algorithm, Swarm())
    for own, chosen in found:
        assert chosen == elected
        torch.testing.assert_close(own, expected, rtol=1e-10, atol=1e-12)
        assert torch.equal(own, found[0][0])


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize(
    "algorithm", [DSGD(Random(0.5)), D2(Lazy(Ring())), GradientTracking(Ring()), PushSum()], ids=repr
)
def test_resuming_after_a_round_is_exact(algorithm: Decentralized) -> None:
    callback = ModelCheckpoint("ckpt", filename="{epoch}", save_top_k=-1)
    whole, resumed = FederatedStrategy(algorithm), FederatedStrategy(algorithm)
    module = Plain()
    trainer(whole, 4, callbacks=[callback], enable_checkpointing=True).fit(module, image_clients((4, 9, 6, 5)))
    again = Plain()
    trainer(resumed, 4).fit(again, image_clients((4, 9, 6, 5)), ckpt_path="ckpt/epoch=1.ckpt", weights_only=True)
    assert torch.equal(weights(again), weights(module))
    torch.testing.assert_close(resumed.active_driver.state.server, whole.active_driver.state.server, rtol=0, atol=0)


class BreaksOnce(Quadratic):
    """Its third client has NaN in the second round."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        is_broken = self.trainer.current_epoch == 1 and bool(batch[0][0] == E[2])
        return loss * float("nan") if is_broken else loss


@pytest.mark.parametrize("algorithm", [GradientTracking(), D2(), DSGD()], ids=str)
def test_a_refused_update_is_a_change_of_zero(algorithm: Decentralized) -> None:
    strategy = FederatedStrategy(algorithm, local_steps=1, engine="sequential")
    with pytest.warns(UserWarning, match="NaN"):
        trainer(strategy, 4).fit(BreaksOnce(), quadratic_clients(E[:3], H[:3], (1,) * 3))
    e, h, p = torch.tensor(E[:3]).double(), torch.tensor(H[:3]).double(), torch.ones(3).double() / 3
    state = algorithm.server_init({"x": torch.full((1,), 10.0).double()}, 3)
    for round in range(4):
        change = 0.1 * h * (e - state["nodes"]["x"][:, 0])
        change[2] *= round != 1
        aggregate = Aggregate({}, {}, 1.0, {}, 3, 3, nodes={"x": change[:, None]}, node_weights=p)
        state = algorithm.server_update(state, aggregate)
    assert nodes_of(strategy) == pytest.approx(state["nodes"]["x"].flatten().tolist(), rel=1e-12)


def test_an_edge_of_which_nothing_is_left_keeps_its_model() -> None:
    clients = quadratic_clients((*E[:2], float("nan")), H[:3], (2, 2, 20))
    strategy = FederatedStrategy("fedavg", topology=Edges([[0, 1], [2]], 3), local_steps=1, engine="sequential")
    with pytest.warns(UserWarning, match="NaN"):
        minimise(strategy, 1, clients)
    assert nodes_of(strategy) == pytest.approx([8.6, 8.6, 10.0], rel=1e-12)


WEIGHTED = [Ring(), Path(), Star(), Random(0.5), Lazy(Ring()), Complete(), Edges(GROUPS, 2)]


@pytest.mark.parametrize("topology", WEIGHTED, ids=str)
def test_nodes_settle_at_the_weighted_optimum(topology: Topology) -> None:
    # With gradients of one slope the weighted mean of the nodes is at the optimum also where the nodes are not.
    e, p = torch.tensor(E).double(), torch.tensor(SIZES).double() / sum(SIZES)
    algorithm = DSGD(topology)
    state = algorithm.server_init({"x": torch.full((1,), 10.0).double()}, 5)
    for _ in range(150):
        deltas = {"x": 0.2 * (e[:, None] - state["nodes"]["x"])}
        state = algorithm.server_update(state, Aggregate({}, {}, 1.0, {}, 5, 5, nodes=deltas, node_weights=p))
    assert float(state["params"]["x"]) == pytest.approx(float(p @ e), rel=1e-9)


def test_corrected_nodes_settle_at_the_weighted_optimum() -> None:
    optimum = sum(n * h * e for n, h, e in zip(SIZES, H, E, strict=True)) / sum(map(operator.mul, SIZES, H))
    for algorithm in (D2(Lazy(Ring())), GradientTracking(Ring())):
        assert simulate(algorithm, 400, 1, SIZES).tolist() == pytest.approx([optimum] * 5, rel=1e-9)


def test_equal_weights_and_none_are_the_same_bit_for_bit() -> None:
    for topology in (Ring(), Path(), Star(), Random(0.5)):
        assert torch.equal(topology.matrix(7), topology.matrix(7, weights=torch.full((7,), 1 / 7, dtype=torch.float64)))


def test_a_node_without_data_does_not_cut_a_path() -> None:
    matrix = Path().matrix(3, weights=torch.tensor([0.3, 0.0, 0.7]).double())
    assert (matrix.matrix_power(2) > 0).all()


def test_weights_that_would_be_ignored_are_refused() -> None:
    strategy = FederatedStrategy("fedavg", topology=Exponential(), local_steps=1)
    with pytest.raises(ValueError, match="would be ignored"):
        minimise(strategy, 1, five(SIZES))
    with pytest.raises(ValueError, match="would be ignored"):
        FederatedStrategy("pushsum", weighting="examples")


def test_a_node_that_breaks_mixes_the_model_it_has() -> None:
    clients = quadratic_clients((*E[:4], float("nan")), H, (1,) * 5)
    strategy = FederatedStrategy("dsgd", topology=Ring(), local_steps=1, engine="sequential")
    with pytest.warns(UserWarning, match="NaN"):
        minimise(strategy, 1, clients)
    x = torch.tensor([10 - 0.1 * h * (10 - e) for e, h in zip(E[:4], H[:4], strict=True)] + [10.0], dtype=torch.float64)
    assert nodes_of(strategy) == pytest.approx((Ring().matrix(5) @ x).tolist(), rel=1e-12)


def train() -> tuple[Tensor, list[float]]:
    module, strategy = Plain(), FederatedStrategy("gradienttracking", topology=Ring())
    trainer(strategy, 3).fit(module, image_clients((1, 7, 23, 5)))
    return weights(module), [entry["consensus"] for entry in strategy.history]


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_train_what_one_does(run_ranks: Any, world_size: int) -> None:
    expected, apart = train()
    for found, own in run_ranks(world_size, train):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
        assert own == pytest.approx(apart, rel=1e-9)


def test_what_would_be_ignored_or_diverge_is_refused() -> None:
    for options, match in [
        ({"algorithm": "scaffold", "topology": Ring()}, "has a server"),
        ({"algorithm": FedAvg(server_lr=0.5), "topology": Ring()}, "has a server"),
        ({"algorithm": "dsgd", "clients_per_round": 2}, "clients_per_round"),
        ({"algorithm": "dsgd", "aggregator": fl.aggregation.Median()}, "Median"),
        ({"algorithm": "dsgd", "transforms": [fl.privacy.ClientLevelDP(1.0, 1.0)]}, "no server"),
        ({"algorithm": "fedavg", "aggregator": fl.aggregation.Nodes()}, "Leave aggregator out"),
        ({"algorithm": "dsgd", "topology": Cyclic()}, "one per client"),
        ({"topology": Cyclic(), "clients_per_round": 2}, "says who takes part"),
        ({"algorithm": "dsgd", "topology": Swarm()}, "one model for all"),
        ({"topology": Swarm(), "aggregator": fl.aggregation.Median()}, "would be ignored"),
        ({"topology": Swarm(), "federation": "https://localhost", "kit": "kit"}, "one party does for good"),
        ({"topology": "ring"}, "fl.topologies.Ring"),
    ]:
        with pytest.raises(ValueError, match=match):
            FederatedStrategy(**options)  # type: ignore[arg-type]
    params = {"x": torch.zeros(1)}
    for algorithm, size, match in [
        (D2(Hypercube()), 8, "Lazy"),
        (D2(Random(0.5)), 5, "static"),
        (DSGD(Graph([(0, 1), (2, 3)])), 4, "does not connect"),
        (DSGD(Graph([(0, 1), (1, 0)], directed=True)), 2, "pushsum"),
    ]:
        with pytest.raises(ValueError, match=match):
            algorithm.server_init(params, size)
    D2(Lazy(Hypercube())).server_init(params, 8)


def test_push_sum_keeps_the_sum() -> None:
    graph = Graph([(0, 1), (1, 2), (2, 0), (0, 2)], directed=True)
    algorithm, start = PushSum(graph), torch.tensor([[1.0], [5.0], [-3.0]]).double()
    state = algorithm.server_init({"x": torch.zeros(1).double()}, 3)
    state = {**state, "sums": {"x": start}}
    still = Aggregate({}, {}, 1.0, {}, 3, 3, {"x": torch.zeros(3, 1).double()}, torch.full((3,), 1 / 3).double())
    for _ in range(100):
        state = algorithm.server_update(state, still)
        assert state["sums"]["x"].sum().item() == pytest.approx(3.0)
        assert state["mass"].sum().item() == pytest.approx(3.0)
    assert state["nodes"]["x"].flatten().tolist() == pytest.approx([1.0] * 3)


def test_yaml_gives_topologies() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(FederatedStrategy, "strategy")
    ring = {"class_path": "Torus", "init_args": {"rows": 2, "columns": 2}}
    config = parser.parse_object({"strategy": {"algorithm": "dsgd", "topology": ring}})
    assert parser.instantiate_classes(config).strategy.algorithm == replace(DSGD(), topology=fl.topologies.Torus(2, 2))
