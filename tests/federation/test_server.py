"""The server's side of a round, as pure functions."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from lightning_fl.aggregation import RoundContext, Transform, WeightedMean
from lightning_fl.algorithms import Algorithm, FedAdam, FedAvg, Scaffold
from lightning_fl.federation import FederationSettings, FederationState, open_server, server_step
from lightning_fl.federation.server import some, stop_reason
from lightning_fl.tree import clone
from lightning_fl.types import Aggregate, State, Tree

PARAMS = {"a": torch.tensor([1.0, 2.0], dtype=torch.float64), "b": torch.tensor(3.0, dtype=torch.float64)}
CONTEXT = RoundContext(round=4, cohort=[0, 1, 2], population=5)


@dataclass(frozen=True)
class Adds(Transform):
    """Adds ``value`` to the sum after multiplying it by ``factor``, and counts its calls in its state."""

    factor: float = 1.0
    value: float = 0.0
    weight: float | None = None
    stops: bool = False

    def start_round(self, state: Any, ctx: RoundContext) -> Any:
        return {"rounds": state.get("rounds", torch.zeros(())) + 1}

    def server(self, aggregate: Aggregate, state: Any, ctx: RoundContext) -> tuple[Aggregate, Any]:
        delta = {name: self.factor * total + self.value for name, total in aggregate.delta.items()}
        weight = aggregate.weight if self.weight is None else self.weight
        return replace(aggregate, delta=delta, weight=weight), {**state, "served": torch.tensor(ctx.round)}

    def report(self, state: Any, ctx: RoundContext) -> dict[str, float | str]:
        return {f"served {self.value}": float(state["served"])}

    def stop_reason(self, state: Any, ctx: RoundContext) -> str | None:
        return f"{self.value} is spent" if self.stops else None


def settings(algorithm: Algorithm | None = None, *transforms: Transform) -> FederationSettings:
    return FederationSettings(algorithm or FedAvg(), WeightedMean(), transforms, "examples", 0, population=5)


def aggregate(weight: float = 4.0, **aux: Tree) -> Aggregate:
    delta = {name: torch.full_like(value, 8.0) for name, value in PARAMS.items()}
    return Aggregate(delta, {}, weight, aux, num_clients=3, population=5)


def opened(own: FederationSettings, server: Any = None) -> FederationState:
    return open_server(own, FederationState(server or {}), PARAMS, CONTEXT)


def test_the_model_moves_by_the_mean() -> None:
    own = settings()
    state, _, facts = server_step(own, opened(own), aggregate(), CONTEXT)
    torch.testing.assert_close(state.server["params"], {name: value + 2 for name, value in PARAMS.items()})
    assert facts == {}


def test_nothing_that_is_given_is_changed() -> None:
    own = settings(Scaffold(), Adds(2.0, 1.0))
    state, total = opened(own), aggregate(control=clone(PARAMS))
    before = copy.deepcopy([dict(state.server), list(state.transforms), total.delta, dict(total.aux)])
    first = server_step(own, state, total, CONTEXT)
    torch.testing.assert_close([dict(state.server), list(state.transforms), total.delta, dict(total.aux)], before)
    second = server_step(own, state, total, CONTEXT)
    torch.testing.assert_close(dict(first[0].server), dict(second[0].server), rtol=0, atol=0)


def test_server_halves_run_in_reverse() -> None:
    own = settings(None, Adds(3.0, 1.0), Adds(1.0, 5.0))
    state, total, facts = server_step(own, opened(own), aggregate(), CONTEXT)
    assert total.delta["b"].item() == 3 * (8 + 5) + 1
    assert state.server["params"]["b"].item() == 3.0 + 40 / 4
    assert facts == {"served 1.0": 4.0, "served 5.0": 4.0}
    assert [set(one) for one in state.transforms] == [{"rounds", "served"}] * 2


def test_an_aggregate_that_weighs_nothing_leaves_the_algorithm_as_it_is() -> None:
    own = settings(FedAdam(), Adds(1.0, 0.0))
    before = opened(own)
    state, _, facts = server_step(own, before, aggregate(weight=0.0), CONTEXT)
    assert state.server is before.server
    assert set(state.transforms[0]) == {"rounds", "served"}
    assert facts == {"served 0.0": 4.0}


class Forgets(FedAdam):
    """Spoils its momentum, and leaves the model alone."""

    def server_update(self, server: State, aggregate: Aggregate) -> State:
        return {**server, "momentum": {name: tensor / 0 for name, tensor in aggregate.delta.items()}}


def test_any_entry_of_a_state_that_is_not_finite_is_refused_and_the_state_before_stays() -> None:
    own = settings(Forgets())
    before = opened(own)
    copied = clone(before.server)
    with pytest.raises(ValueError, match=r"Forgets.server_update returned 'momentum' with NaN or Inf"):
        server_step(own, before, aggregate(), CONTEXT)
    torch.testing.assert_close(clone(before.server), copied, rtol=0, atol=0)


def test_a_transform_can_give_an_empty_round_weight() -> None:
    own = settings(None, Adds(0.0, 6.0, weight=3.0))
    state, total, _ = server_step(own, opened(own), aggregate(weight=0.0), CONTEXT)
    assert total.weight == 3.0
    assert state.server["params"]["b"].item() == 3.0 + 6 / 3


# ---- opening a round


def test_the_first_round_starts_with_the_algorithms_state() -> None:
    state = opened(settings(Scaffold()))
    torch.testing.assert_close(dict(state.server), dict(Scaffold().server_init(PARAMS, 5)))


def test_a_later_round_keeps_the_state_and_takes_the_modules_parameters() -> None:
    last = {
        "params": {name: value - 1 for name, value in PARAMS.items()},
        "control": {n: v * 7 for n, v in PARAMS.items()},
    }
    state = opened(settings(Scaffold()), last)
    assert state.server == {"params": PARAMS, "control": last["control"]}


def test_transforms_start_with_their_own_states() -> None:
    own = settings(None, Adds(), Adds(value=1.0))
    first = open_server(own, FederationState(), PARAMS, CONTEXT)
    second = open_server(own, FederationState(first.server, first.transforms[:1]), PARAMS, CONTEXT)
    assert [state["rounds"].item() for state in second.transforms] == [2, 1]


def test_tensors_that_are_shared_from_now_on_get_a_fresh_state() -> None:
    own = settings(FedAdam())
    start = FedAdam().server_init({"a": PARAMS["a"]}, 5)
    last = {key: {"a": tree["a"] + 1} for key, tree in start.items() if isinstance(tree, dict)}
    state = opened(own, last)
    fresh = FedAdam().server_init(PARAMS, 5)
    assert state.server.keys() == fresh.keys()
    assert state.server["params"] == PARAMS
    for key in last.keys() - {"params"}:
        torch.testing.assert_close(state.server[key], {"a": last[key]["a"], "b": fresh[key]["b"]})


def test_such_tensors_are_refused_where_clients_keep_state_for_each() -> None:
    last = Scaffold().server_init({"a": PARAMS["a"]}, 5)
    with pytest.raises(ValueError, match=r"shared tensors have changed between rounds \('b'\).*Scaffold"):
        opened(settings(Scaffold()), last)


def test_the_first_reason_to_stop_counts() -> None:
    own = settings(None, Adds(value=1.0), Adds(value=2.0, stops=True), Adds(value=3.0, stops=True))
    assert stop_reason(own, opened(own), CONTEXT) == "2.0 is spent"
    assert stop_reason(settings(), opened(settings()), CONTEXT) is None


def test_error_messages_name_the_first_five() -> None:
    assert some(["a", 2]) == "'a', 2"
    assert some(range(6)) == "0, 1, 2, 3, 4, ..."
