"""A client group gives each of its clients what a group of that client alone gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_fl.aggregation import WeightedMean
from lightning_fl.algorithms import (
    Algorithm,
    Ditto,
    FedAdam,
    FedAvg,
    FedDyn,
    FedNova,
    FedProx,
    MimeLite,
    QFedAvg,
    Scaffold,
)
from lightning_fl.engines import LocalResult
from lightning_fl.engines.vectorized.stacking import NotStackable, part
from lightning_fl.federation import ClientGroup, FederationSettings, GroupUpdate
from lightning_fl.torch_internals import pytree
from lightning_fl.types import Context, LocalRun, State, Tree

CLIENTS = ["a", "b", "c"]
ALGORITHMS: list[Algorithm] = [
    FedAvg(),
    FedProx(0.5),
    FedAdam(),
    Scaffold(),
    FedNova(),
    FedDyn(alpha=0.3),
    QFedAvg(q=0.5),
    MimeLite(beta1=0.5),
    Ditto(lam=0.7),
]
every_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda algorithm: type(algorithm).__name__)


def draw(seed: int, *leading: int) -> Tree:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"weight": (2, 3), "bias": (2,), "scale": ()}
    return {name: torch.randn((*leading, *shape), generator=generator).double() for name, shape in shapes.items()}


def run_of(client: int, num_steps: int = 4) -> LocalRun:
    return LocalRun(num_steps, 5, float(client + 1), 0.5 + client, dict.fromkeys(draw(0), 0.1 * num_steps), 4.0)


def group_of(
    algorithm: Algorithm, places: Sequence[int], states: Sequence[Mapping[str, Any]] | None = None
) -> ClientGroup:
    settings = FederationSettings(algorithm, WeightedMean(), (), algorithm.weighting, 0, population=len(CLIENTS))
    server = algorithm.server_init(draw(1), len(CLIENTS))
    states = [{}] * len(CLIENTS) if states is None else states
    probe = {None: None, "loss": 0.7, "grad": draw(2)}[algorithm.probe]
    return ClientGroup(settings, server, [CLIENTS[i] for i in places], [states[i] for i in places], probe)


def finish(group: ClientGroup, places: Sequence[int], runs: Sequence[LocalRun], seed: int = 3) -> GroupUpdate:
    trained, buffers = draw(seed, len(CLIENTS)), {"mean": torch.arange(6.0).reshape(3, 2)}
    kept = {"personal": {"head": torch.arange(3.0)}}
    result = LocalResult(*part_of((trained, buffers, kept), places), facts=[])
    return group.finish(result, [runs[i] for i in places])


def part_of(value: Any, places: Sequence[int]) -> Any:
    return pytree.tree_map(lambda leaf: leaf[list(places)], value)


def assert_same(found: GroupUpdate, index: int, alone: GroupUpdate) -> None:
    mine, theirs = found.update_of(index), alone.update_of(0)
    for name in ("delta", "buffers", "aux"):
        torch.testing.assert_close(getattr(mine, name), getattr(theirs, name), rtol=1e-12, atol=1e-15)
    assert mine.weight == theirs.weight
    torch.testing.assert_close(found.state_of(index), alone.state_of(0), rtol=1e-12, atol=1e-15)


EQUAL = [run_of(client) for client in range(3)]
UNEQUAL = [run_of(client, num_steps=2 + client) for client in range(3)]


@every_algorithm
@pytest.mark.parametrize("runs", [EQUAL, UNEQUAL], ids=["equal work", "unequal work"])
def test_updates_and_states_in_two_rounds(algorithm: Algorithm, runs: list[LocalRun]) -> None:
    states: list[dict[str, Any]] = [{}, {}, {}]
    for seed in (3, 4):
        # A probe is of a client alone, so such an algorithm has groups of one only.
        places = [0, 1, 2] if algorithm.probe is None else [1]
        together = finish(group_of(algorithm, places, states), places, runs, seed)
        for index, place in enumerate(places):
            alone = finish(group_of(algorithm, [place], states), [place], runs, seed)
            assert_same(together, index, alone)
            assert alone.state_of(0).keys() >= ({"algorithm"} if algorithm.keeps_client_state else set())
        states = [together.state_of(places.index(i)) if i in places else {} for i in range(3)]


@every_algorithm
def test_gradients(algorithm: Algorithm) -> None:
    grads, params = draw(5, len(CLIENTS)), draw(6, len(CLIENTS))
    places = [0, 1, 2] if algorithm.probe is None else [1]
    states = [finish(group_of(algorithm, [i]), [i], EQUAL).state_of(0) for i in range(3)]
    group = group_of(algorithm, places, states)
    for phase in algorithm.phases():
        together = group.grad_transform(phase)
        for index, place in enumerate(places):
            alone = group_of(algorithm, [place], states).grad_transform(phase)
            assert (together is None) == (alone is None)
            if together is None or alone is None or len(places) == 1:
                continue
            found = part(together(grads, params), index)
            torch.testing.assert_close(found, alone(part(grads, place), part(params, place)), rtol=1e-12, atol=1e-15)


def test_an_algorithm_that_changes_no_gradients_has_no_transform() -> None:
    group = group_of(FedAvg(), [0, 1])
    assert [group.grad_transform(phase) for phase in FedAvg().phases()] == [None]


def test_only_the_selected_clients_train() -> None:
    states = [finish(group_of(Scaffold(), [i]), [i], EQUAL).state_of(0) for i in range(3)]
    group = group_of(Scaffold(), [0, 1, 2], states)
    grads, params = draw(5, len(CLIENTS)), draw(6, len(CLIENTS))
    transform = group.grad_transform(Scaffold().phases()[0])
    assert transform is not None
    every = transform(grads, params)
    for mask in ([0, 2], [1], [0, 1, 2]):
        group.select(mask)
        found = transform(part_of(grads, mask), part_of(params, mask))
        torch.testing.assert_close(found, part_of(every, mask), rtol=1e-12, atol=1e-15)


def test_what_goes_into_a_group_is_not_changed() -> None:
    states = [finish(group_of(Scaffold(), [i]), [i], EQUAL).state_of(0) for i in range(3)]
    before = pytree.tree_map(torch.clone, states)
    group = group_of(Scaffold(), [0, 1, 2], states)
    first, second = (finish(group, [0, 1, 2], EQUAL) for _ in range(2))
    torch.testing.assert_close(states, before, rtol=0, atol=0)
    torch.testing.assert_close(first.updates.delta, second.updates.delta, rtol=0, atol=0)


class Branches(FedAvg):
    """Looks at a tensor's value in ``client_finish``, which ``torch.func.vmap`` can't do."""

    def client_finish(self, params: Tree, ctx: Context, client: State | None, run: LocalRun) -> Any:
        update, state = super().client_finish(params, ctx, client, run)
        if bool(update.delta["scale"] > 0):
            update = replace(update, delta={name: -value for name, value in update.delta.items()})
        return update, state


def test_what_vmap_can_not_do_is_done_client_by_client() -> None:
    together = finish(group_of(Branches(), [0, 1, 2]), [0, 1, 2], EQUAL)
    for place in range(3):
        assert_same(together, place, finish(group_of(Branches(), [place]), [place], EQUAL))
    assert bool((together.updates.delta["scale"] <= 0).all())


class Uneven(FedAvg):
    """Gives each client a context of another shape."""

    def client_init(self, server: State, client: State | None, probe: Any = None) -> Context:
        size = int(client["size"]) if client else 1
        return {"params": server["params"], "own": torch.zeros(size)}


def test_contexts_that_can_not_stand_side_by_side_are_refused() -> None:
    states = [{"algorithm": {"size": Tensor([size])}} for size in (1, 2, 3)]
    with pytest.raises(NotStackable, match="differ in shape"):
        group_of(Uneven(), [0, 1], states)
    assert group_of(Uneven(), [1], states).starts[0].keys() == draw(0).keys()
