"""What a user's algorithm or aggregator returns wrong is refused by its name, and the global model stays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from lightning_fl.aggregation import RoundContext, Transform, WeightedMean
from lightning_fl.algorithms import Algorithm
from lightning_fl.federation import FederationSettings, FederationState, open_server
from lightning_fl.types import Aggregate, Tree, Update
from tests.helpers.federation import Simulation, quadratics

PARAMS = {"x": torch.tensor([10.0, 2.0], dtype=torch.float64)}


def spoilt(method: str, spoil: Callable[[Any], Any]) -> Algorithm:
    right = getattr(Algorithm, method)
    body = {method: lambda self, *args, **kwargs: spoil(right(self, *args, **kwargs))}
    return dataclass(frozen=True)(type("Mine", (Algorithm,), body))()


def simulation(algorithm: Algorithm | None = None) -> Simulation:
    return Simulation(algorithm or Algorithm(), quadratics([0.0, 1.0], [1.0, 2.0]), PARAMS)


def assert_refused(own: Simulation, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        own.round()
    assert torch.equal(own.server["params"]["x"], PARAMS["x"])
    assert own.num_rounds == 0


def with_params(change: Callable[[Tree], Any]) -> Callable[[Any], Any]:
    return lambda state: {**state, "params": change(state["params"])}


PARTS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "another shape": (with_params(lambda tree: {"x": tree["x"][:1]}), r"hold 'x' of the shape \(1,\); expected \(2,\)"),
    "a shape that fits by broadcasting": (with_params(lambda tree: {"x": tree["x"].sum()}), r"of the shape \(\)"),
    "another name": (with_params(lambda tree: {"y": tree["x"]}), "lack 'x'"),
    "a name more": (with_params(lambda tree: {**tree, "y": tree["x"]}), "hold 'y'; expected 'x'"),
    "no tensor": (with_params(lambda tree: {"x": tree["x"].tolist()}), "hold a list as 'x'; expected a tensor"),
    "no params": (lambda state: {"param": state["params"]}, "a dict of 'param'; expected .* as the entry 'params'"),
    "nothing": (lambda state: None, "NoneType; expected"),
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("method", ["server_update", "client_init"])
def test_a_wrong_model(method: str, part: str) -> None:
    spoil, message = PARTS[part]
    assert_refused(simulation(spoilt(method, spoil)), rf"Mine\.{method} returned .*{message}")


@pytest.mark.parametrize("part", PARTS)
def test_a_wrong_first_state(part: str) -> None:
    spoil, message = PARTS[part]
    settings = FederationSettings(spoilt("server_init", spoil), WeightedMean(), (), "examples", 0, population=2)
    with pytest.raises(ValueError, match=rf"Mine\.server_init returned .*{message}"):
        open_server(settings, FederationState({}), PARAMS, RoundContext(round=0, cohort=[0], population=2))


def test_a_server_that_divides_by_zero() -> None:
    spoil = with_params(lambda tree: {"x": tree["x"] / 0})
    assert_refused(simulation(spoilt("server_update", spoil)), "server_update returned 'params' with NaN or Inf")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda pair: pair[0], "client_finish returned Update; expected a pair"),
        (lambda pair: (pair[0].delta, None), "returned dict, NoneType; expected a pair"),
        (lambda pair: (pair[0], {"seen": {"rounds": 3}}), "a client's state with int as 'seen/rounds'; .*torch.tensor"),
        (lambda pair: (Update({"y": torch.zeros(())}), None), "The update's delta 'x' has shape none"),
    ],
    ids=["no state", "a tree", "a number as state", "another name"],
)
def test_a_client_that_returns_something_else(spoil: Callable[[Any], Any], message: str) -> None:
    assert_refused(simulation(spoilt("client_finish", spoil)), message)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda grads: None, "returned NoneType; expected a dict of gradients"),
        (lambda grads: {"y": grads["x"]}, r"returned \{'y': \(2,\)\}; expected .*\{'x': \(2,\)\}"),
        (lambda grads: {"x": grads["x"].sum()}, r"returned \{'x': \(\)\}"),
    ],
    ids=["nothing", "another name", "another shape"],
)
def test_wrong_gradients(spoil: Callable[[Any], Any], message: str) -> None:
    assert_refused(simulation(spoilt("grad_transform", spoil)), message)


WRONG_AGGREGATES: dict[str, tuple[Callable[[Aggregate], Any], str]] = {
    "a shape that fits by broadcasting": (
        lambda found: replace(found, delta={"x": found.delta["x"].sum()}),
        r"Aggregate whose delta hold 'x' of the shape \(\); expected \(2,\)",
    ),
    "a buffer that nobody has": (
        lambda found: replace(found, buffers={"y": torch.zeros(())}),
        "whose buffers hold 'y'; expected none",
    ),
    "a tree": (lambda found: found.delta, "returned dict; expected an Aggregate"),
}


@pytest.mark.parametrize("part", WRONG_AGGREGATES)
@pytest.mark.parametrize("owner", ["aggregator", "transform"])
def test_a_wrong_aggregate(owner: str, part: str) -> None:
    spoil, message = WRONG_AGGREGATES[part]

    class Own(WeightedMean):
        def result(self, acc: Any, ctx: RoundContext) -> Any:
            return spoil(super().result(acc, ctx))

    class OwnTransform(Transform):
        def server(self, aggregate: Aggregate, state: Any, ctx: RoundContext) -> tuple[Any, Any]:
            return spoil(aggregate), state

    own = simulation()
    is_aggregator = owner == "aggregator"
    chosen = {"aggregator": Own()} if is_aggregator else {"transforms": (OwnTransform(),)}
    own.settings = replace(own.settings, **chosen)
    name = r"Own\.result" if is_aggregator else r"OwnTransform\.server"
    assert_refused(own, rf"{name} .*{message}")


def test_an_aggregator_that_returns_nan() -> None:
    class Own(WeightedMean):
        def result(self, acc: Any, ctx: RoundContext) -> Aggregate:
            found = super().result(acc, ctx)
            return replace(found, delta={"x": found.delta["x"] * float("nan")})

    own = simulation()
    own.settings = replace(own.settings, aggregator=Own())
    assert_refused(own, "The aggregator, or .* with NaN or Inf, although no client's update has any")
