"""Several models in one federation: known answers on quadratics and small rows, also on ranks."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import lightning_fl as fl
from lightning_fl import FederatedStrategy
from lightning_fl.algorithms import CFL, IFCA, FedAMP
from lightning_fl.algorithms.cfl import second_half
from lightning_fl.types import State, Tree
from tests.helpers.training import Quadratic, quadratic_clients, trainer
from tests.trainer.robust.test_known_answers import Sends, loaders
from tests.trainer.silos.test_neighbours import quadratic

AMP = [0.1883723916, 1.0278936119, 3.5116807692]
ROWS = [[1.0, 0.1], [0.9, -0.1], [-1.0, 0.2], [-0.9, -0.2]]


def server_of(algorithm: Any, rounds: int, clients: Any, module: Any = None, **options: Any) -> State:
    strategy = FederatedStrategy(algorithm, **options)
    trainer(strategy, rounds).fit(Quadratic() if module is None else module, clients)
    state: State = strategy.active_driver.state.server
    return state


# ---- FedAMP


def amp() -> list[float]:
    found: list[float] = server_of(FedAMP(), 150, quadratic_clients(), local_steps=5)["nodes"]["x"].flatten().tolist()
    return found


def test_fedamp_settles_where_near_clients_attract_each_other() -> None:
    assert amp() == pytest.approx(AMP, rel=1e-8)


def test_fedamp_without_attraction_trains_each_alone() -> None:
    nodes = server_of(FedAMP(lam=0.0), 60, quadratic_clients(), local_steps=5)["nodes"]["x"].flatten()
    assert nodes.tolist() == pytest.approx([0.0, 1.0, 4.0], abs=1e-3)


# ---- CFL


def split(rounds: int = 2) -> State:
    return server_of(CFL(eps1=0.4, eps2=0.5), rounds, loaders(ROWS, torch.float64), Sends(2, torch.float64))


def test_cfl_splits_where_the_updates_point_apart() -> None:
    assert split(1)["groups"].tolist() == [0, 0, 1, 1]
    state = split()
    (nodes,) = state["nodes"].values()
    # The first round has moved all by their mean, the second each group by its own.
    assert nodes.flatten().tolist() == pytest.approx([0.95, 0.0, 0.95, 0.0, -0.95, 0.0, -0.95, 0.0], abs=1e-12)
    assert second_half(torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 0.1]])).tolist() == [1]


@pytest.mark.parametrize("algorithm", [CFL(eps1=0.0), CFL(eps1=0.4, eps2=2.0), CFL(eps2=0.5, min_size=5)], ids=repr)
def test_cfl_leaves_a_group_together_that_moves_agrees_or_is_small(algorithm: CFL) -> None:
    state = server_of(algorithm, 1, loaders(ROWS, torch.float64), Sends(2, torch.float64))
    assert state["groups"].tolist() == [0] * 4


# ---- IFCA

TWO_GROUPS = (0.0, 0.2, 4.0, 4.4)


@dataclass(frozen=True)
class Started(IFCA):
    """IFCA from two models that the test chooses."""

    start: tuple[float, float] = (1.0, 3.0)

    def server_init(self, params: Tree, population: int) -> State:
        return {"params": params, "models": {"x": torch.tensor(self.start, dtype=torch.float64)[:, None]}}


def ifca(rounds: int, start: tuple[float, float] = (1.0, 3.0)) -> list[float]:
    clients = quadratic_clients(TWO_GROUPS, (1.0,) * 4, (1,) * 4)
    found: list[float] = (
        server_of(Started(start=start), rounds, clients, local_steps=5)["models"]["x"].flatten().tolist()
    )
    return found


def test_ifca_finds_both_groups() -> None:
    assert ifca(1) == pytest.approx([0.631441, 3.491412], rel=1e-6)
    assert ifca(40) == pytest.approx([0.1, 4.2], rel=1e-7)


def test_a_model_that_nobody_chooses_stays() -> None:
    assert ifca(3, (1.0, 30.0))[1] == 30.0


def test_what_clients_send_of_ifca_can_be_compressed_and_attacked() -> None:
    clients = quadratic_clients(TWO_GROUPS, (1.0,) * 4, (1,) * 4)
    top = fl.compression.Compress(fl.compression.TopK(0.5), error_feedback=False)  # one number of two models
    strategy = FederatedStrategy(Started(), local_steps=5, transforms=[top])
    module = Quadratic()
    trainer(strategy, 1).fit(module, clients)
    assert strategy.history[-1]["bytes_per_client"] == top.compressor.num_bytes(2)
    models = strategy.active_driver.state.server["models"]["x"].flatten().tolist()
    assert models == pytest.approx(ifca(1), rel=1e-6)
    adversary = fl.attacks.Adversary(fl.attacks.SignFlip(1.0), clients=[0, 1, 2, 3])
    flipped = server_of(Started(), 1, clients, local_steps=5, adversary=adversary)["models"]["x"].flatten().tolist()
    assert flipped == pytest.approx([2 * 1.0 - models[0], 2 * 3.0 - models[1]], rel=1e-6)


def test_the_models_of_ifca_start_apart_and_the_first_is_that_of_the_user() -> None:
    params = {"w": torch.full((50,), 2.0), "b": torch.zeros(4)}
    first, second = IFCA(spread=0.1).candidates(IFCA(spread=0.1).server_init(params, 5))
    assert torch.equal(first["w"], params["w"])
    assert (second["w"] - 2).std().item() == pytest.approx(0.2, rel=0.3)
    assert second["b"].abs().min() > 0


# ---- on ranks


def all_of_them() -> list[float]:
    (nodes,) = split()["nodes"].values()
    return [*amp(), *ifca(3), *nodes.flatten().tolist()]


@pytest.mark.slow  # the contract trains each of them on ranks too
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_do_what_one_does(run_ranks: Any, world_size: int) -> None:
    expected = all_of_them()
    for found in run_ranks(world_size, all_of_them):
        assert found == pytest.approx(expected, rel=1e-9)


CLUSTERED = (FedAMP(), CFL(eps1=100.0, eps2=0.1), IFCA())


def flat(states: Sequence[State]) -> list[float]:
    trees = [tree for state in states for tree in state.values() if isinstance(tree, Mapping)]
    return torch.cat([tensor.flatten() for tree in trees for tensor in tree.values()]).tolist()


def silo() -> list[float]:
    clients = quadratic(int(os.environ["RANK"]))
    return flat([server_of(algorithm, 3, clients, local_steps=5) for algorithm in CLUSTERED])


@pytest.mark.slow
def test_silos_do_what_a_simulation_does(run_ranks: Any) -> None:
    first, second = run_ranks(2, silo)
    assert first == second
    clients = quadratic_clients((0.0, 1.0), (1.0, 2.0), (1, 1))
    expected = flat([server_of(algorithm, 3, clients, local_steps=5) for algorithm in CLUSTERED])
    assert first == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (FedAMP, {"sigma": 0.0}),
        (FedAMP, {"alpha": 0.0}),
        (FedAMP, {"lam": -1.0}),
        (CFL, {"eps1": -1.0}),
        (CFL, {"min_size": 1}),
        (IFCA, {"num_models": 0}),
        (IFCA, {"spread": -0.1}),
    ],
)
def test_numbers_out_of_range_are_refused(kind: Any, options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        kind(**options)


def test_a_server_that_sees_sums_only_can_not_serve_them() -> None:
    for name in ("fedamp", "cfl"):
        with pytest.raises(ValueError, match="aggregator"):
            FederatedStrategy(name, aggregator=fl.aggregation.Median())
    assert isinstance(FederatedStrategy("ifca").aggregator, fl.aggregation.WeightedMean)
