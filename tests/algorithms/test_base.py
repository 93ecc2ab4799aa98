from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import FrozenInstanceError, dataclass, replace

import pytest
import torch
from torch import Tensor

from lightning_fl.algorithms import Algorithm, FedAvg, get_algorithm, registered
from lightning_fl.types import Aggregate, Context, LocalRun, State, Tree
from tests.helpers.federation import Simulation, quadratics

PARAMS = {"x": torch.tensor([10.0], dtype=torch.float64)}
CENTERS, STEEPNESS, WEIGHTS = (0.0, 1.0, 4.0), (1.0, 2.0, 0.5), (0.25, 0.5, 0.25)
RUN = LocalRun(num_steps=2, num_examples=3, weight=3.0, loss=0.1, lr_sum={"x": 0.2}, normalizer=2.0)


def total(delta: float, weight: float, aux: Mapping[str, Tree] | None = None) -> Aggregate:
    tree = {"x": torch.tensor([delta], dtype=torch.float64)}
    return Aggregate(tree, {}, weight, aux or {}, num_clients=2, population=4)


def assert_trees_of_tensors(state: object) -> None:
    if isinstance(state, dict):
        for value in state.values():
            assert_trees_of_tensors(value)
    else:
        assert isinstance(state, Tensor), f"{type(state).__name__} in a state"


@pytest.mark.parametrize(
    ("num_steps", "expected"), [(1, 1.0909090909), (2, 1.1017369727), (5, 1.1359075905), (20, 1.2991578746)]
)
@pytest.mark.spread(1)
def test_fedavg_settles_where_the_closed_form_says(num_steps: int, expected: float) -> None:
    federation = Simulation(FedAvg(), quadratics(CENTERS, STEEPNESS), PARAMS, num_steps, weights=WEIGHTS)
    for _ in range(500 // num_steps + 20):
        federation.round()
    assert federation.server["params"]["x"].item() == pytest.approx(expected, abs=1e-9)


def test_one_step_of_all_clients_is_one_step_on_the_pooled_loss() -> None:
    federation = Simulation(FedAvg(), quadratics(CENTERS, STEEPNESS), PARAMS, weights=WEIGHTS)
    federation.round()
    gradient = sum(w * h * (10.0 - e) for w, h, e in zip(WEIGHTS, STEEPNESS, CENTERS, strict=True))
    assert federation.server["params"]["x"].item() == pytest.approx(10.0 - 0.1 * gradient, rel=1e-12)


@pytest.mark.parametrize(("server_lr", "expected"), [(1.0, 12.0), (0.5, 11.0), (0.0, 10.0)])
def test_the_server_moves_by_its_learning_rate_times_the_mean(server_lr: float, expected: float) -> None:
    server = FedAvg(server_lr).server_update({"params": PARAMS, "more": PARAMS}, total(delta=8.0, weight=4.0))
    assert server["params"]["x"].item() == expected
    assert server["more"] is PARAMS


def test_the_defaults_are_fedavg_without_state() -> None:
    class Default(Algorithm):
        pass

    algorithm = Default()
    server = algorithm.server_init(PARAMS, population=4)
    ctx = algorithm.client_init(server, None)
    grads = {"x": torch.ones(1)}
    assert algorithm.grad_transform(grads, PARAMS, ctx) is grads
    update, client = algorithm.client_finish({"x": torch.tensor([7.0], dtype=torch.float64)}, ctx, None, RUN)
    assert (update.delta["x"].item(), dict(update.aux), client) == (-3.0, {}, None)
    assert algorithm.server_update(server, total(8.0, 4.0)) == FedAvg().server_update(server, total(8.0, 4.0))
    assert (algorithm.weighting, algorithm.keeps_client_state, dict(algorithm.aux_like(PARAMS))) == (
        "examples",
        False,
        {},
    )


@dataclass(frozen=True)
class InPlace(FedAvg):
    def server_update(self, server: State, aggregate: Aggregate) -> State:
        server["params"]["x"].add_(aggregate.delta["x"])
        return server


class Quadratic:
    """The gradients of a batch whose loss is half the squared norm."""

    def __call__(self, params: Tree) -> Tree:
        return {name: tensor.clone() for name, tensor in params.items()}

    def hessian_product(self, params: Tree, direction: Tree) -> Tree:
        return {name: tensor.clone() for name, tensor in direction.items()}


def start(algorithm: Algorithm, server: State, grad: Tree) -> Context:
    """The context of the second client, with what a round gives it."""
    losses = torch.tensor([2.0, 3.0], dtype=torch.float64)
    measured = {"loss": losses[0], "grad": grad, "losses": losses}
    server = {**server, "index": 1} if algorithm.knows_index else server
    return algorithm.client_init(server, None, measured.get(algorithm.probe))


def run_once(algorithm: Algorithm, params: Tree) -> None:
    """Calls every method once; fails if one changes what it was given or returns anything but trees."""
    trained = {"x": params["x"] - 1}
    server = algorithm.server_init(params, population=4)
    inputs = copy.deepcopy([server, params, trained])
    ctx = start(algorithm, server, trained)
    algorithm.grad_transform(trained, params, {**ctx, "gradient_at": Quadratic()})
    update, client = algorithm.client_finish(trained, ctx, None, RUN)
    aggregate = total(8.0, 4.0, update.aux)
    if algorithm.keeps_nodes:
        aggregate = replace(aggregate, nodes={"x": torch.ones(4, 1).double()}, node_weights=torch.full((4,), 0.25))
    for state in (server, client or {}, algorithm.server_update(server, aggregate)):
        assert_trees_of_tensors(state)
    assert update.aux.keys() == {*algorithm.aux_like(params), *algorithm.aux_of_clients(population=4)}
    assert algorithm.keeps_client_state == (client is not None)
    torch.testing.assert_close([server, params, trained], inputs, rtol=0, atol=0)


@pytest.mark.parametrize("name", registered())
class TestEveryAlgorithm:
    def test_takes_state_and_returns_state(self, name: str) -> None:
        run_once(get_algorithm(name), copy.deepcopy(PARAMS))

    def test_is_frozen_and_has_no_state_of_its_own(self, name: str) -> None:
        algorithm = get_algorithm(name)
        run_once(algorithm, copy.deepcopy(PARAMS))
        assert algorithm == get_algorithm(name)
        with pytest.raises(FrozenInstanceError):
            algorithm.server_lr = 2.0

    def test_starts_clients_at_the_global_model(self, name: str) -> None:
        algorithm = get_algorithm(name)
        server = algorithm.server_init(PARAMS, population=4)
        assert server["params"] is PARAMS
        params = start(algorithm, server, PARAMS)["params"]
        has_several = algorithm.keeps_nodes or algorithm.probe == "losses"  # models, which begin as the global one
        assert params is PARAMS or (has_several and torch.equal(params["x"], PARAMS["x"]))


def test_an_algorithm_that_changes_its_input_is_caught() -> None:
    with pytest.raises(AssertionError, match="not equal"):
        run_once(InPlace(), copy.deepcopy(PARAMS))
