"""The Python state that a step can reach is seen to change, and can be put back."""

from __future__ import annotations

import array
import functools
import itertools
import random
import threading
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lightning_fl.engines.module_state import Snapshot, capture


class Meter:
    def __init__(self) -> None:
        self.total, self.history = 0.0, [0.0]

    def update(self) -> None:
        self.total += 1
        self.history.append(self.total)


class Slotted:
    __slots__ = ("_Slotted__own", "count")

    def __init__(self) -> None:
        self.count = self.__own = 0

    def step(self) -> None:
        self.__own += 1


class Shared:
    count = 0


@dataclass
class Numbers:
    value: float = float("nan")


NUMBER_OF_CALLS = 0
CALLS: list[int] = []


def on_function() -> None:
    on_function.count = getattr(on_function, "count", 0) + 1  # type: ignore[attr-defined]


def on_globals() -> None:
    global NUMBER_OF_CALLS
    NUMBER_OF_CALLS += 1


def on_global_list() -> None:
    CALLS.append(1)


def by_way_of_another() -> None:
    return on_global_list()


def on_class() -> None:
    Shared.count += 1


def on_closure() -> Callable[[], Any]:
    count, seen = 0, [0]

    def step() -> None:
        nonlocal count
        count += 1
        seen[0] = count

    return step


def on_default(seen: list[int] = [0]) -> None:  # noqa: B006
    seen[0] += 1


def deep() -> Any:
    return {"a": [{"b": (0, {"c": [Meter()]})}]}


class Queue(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bank", torch.zeros(2, 3), persistent=False)


def write_data(tensor: Tensor) -> None:
    tensor.data.add_(1)


def in_inference_mode(tensor: Tensor) -> None:
    with torch.inference_mode():
        tensor.add_(1)


def inferred() -> Tensor:
    with torch.inference_mode():
        return torch.zeros(2)


def collecting() -> nn.Module:
    layer, seen = nn.Linear(2, 2), []  # type: ignore[var-annotated]
    layer.register_forward_hook(lambda module, args, out: seen.append(1))
    return layer


KINDS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "list": (lambda: [1], lambda own: own.append(2)),
    "a list that is as long as before": (lambda: [1, 2], lambda own: own.reverse()),
    "dict": (lambda: {"a": 1}, lambda own: own.update(a=2)),
    "ordered dict": (lambda: OrderedDict(a=1, b=2), lambda own: own.move_to_end("a")),
    "default dict": (lambda: defaultdict(int), lambda own: own["a"]),
    "counter": (Counter, lambda own: own.update("a")),
    "set": (lambda: {1}, lambda own: own.add(2)),
    "deque": (lambda: deque([1, 2], maxlen=2), lambda own: own.append(3)),
    "deep container": (deep, lambda own: own["a"][0]["b"][1]["c"][0].update()),
    "meter": (Meter, lambda own: own.update()),
    "slots": (Slotted, lambda own: own.step()),
    "a number of an object": (Numbers, lambda own: setattr(own, "value", 1.0)),
    "bytearray": (lambda: bytearray(b"ab"), lambda own: own.__setitem__(0, 1)),
    "array": (lambda: array.array("d", [1, 2]), lambda own: own.__setitem__(0, 3)),
    "numpy array": (lambda: np.zeros(3), lambda own: own.__iadd__(1)),
    "numpy array with NaN": (lambda: np.full(3, np.nan), lambda own: own.__setitem__(0, 1)),
    "tensor": (lambda: torch.zeros(2), lambda own: own.add_(1)),
    "tensor with NaN": (lambda: torch.full((2,), float("nan")), lambda own: own.zero_()),
    "tensor's data": (lambda: torch.zeros(2), write_data),
    "tensor in inference mode": (inferred, in_inference_mode),
    "whether it gets a gradient": (lambda: torch.zeros(2), lambda own: own.requires_grad_()),
    "Python's generator": (lambda: random.Random(1), lambda own: own.random()),
    "a method of Python's generator": (lambda: random.Random(1).random, lambda own: own()),
    "NumPy's generator": (lambda: np.random.default_rng(1), lambda own: own.random()),
    "NumPy's old generator": (lambda: np.random.RandomState(1), lambda own: own.normal()),
    "torch's generator": (torch.Generator, lambda own: torch.rand(1, generator=own)),
    "function attribute": (lambda: on_function, lambda own: own()),
    "global": (lambda: on_globals, lambda own: own()),
    "global list": (lambda: on_global_list, lambda own: own()),
    "global of another function": (lambda: by_way_of_another, lambda own: own()),
    "class attribute": (lambda: on_class, lambda own: own()),
    "closure": (on_closure, lambda own: own()),
    "default argument": (lambda: on_default, lambda own: own()),
    "partial": (lambda: functools.partial(list.append, []), lambda own: own(1)),
    "bound method": (lambda: Meter().update, lambda own: own()),
    "forward hook": (collecting, lambda own: own(torch.zeros(2))),
    "metric": (lambda: {"mean": MeanMetric()}, lambda own: own["mean"].update(1.0)),
    "buffer that is not saved": (Queue, lambda own: own.bank.add_(1)),
    "buffer that is replaced": (Queue, lambda own: setattr(own, "bank", torch.ones(2, 3))),
    "mode": (nn.Dropout, lambda own: own.eval()),
    "submodule": (Queue, lambda own: own.add_module("new", nn.Linear(1, 1))),
}


class Holder(nn.Module):
    def __init__(self, held: Any = None) -> None:
        super().__init__()
        self.net = nn.Linear(2, 2)
        self.held = held


def captured(module: nn.Module) -> Snapshot:
    return capture(module, module.parameters())


@pytest.mark.parametrize("name", KINDS)
def test_a_change_is_seen_and_put_back(name: str) -> None:
    make, change = KINDS[name]
    module = Holder(make())
    snapshot = captured(module)
    assert not snapshot.opaque
    assert not list(snapshot.differences())
    change(module.held)
    assert list(snapshot.differences())
    snapshot.restore()
    assert not list(snapshot.differences())
    assert not list(captured(module).differences())
    # The state that was put back can change in the same way again.
    change(module.held)
    assert list(snapshot.differences())
    snapshot.restore()


def test_what_a_generator_draws_is_repeated() -> None:
    module = Holder([random.Random(1), np.random.default_rng(1), torch.Generator()])
    python, numpy, torchs = module.held

    def draw() -> tuple[float, float, float]:
        return python.gauss(), numpy.normal(), float(torch.rand(1, generator=torchs))

    draw()
    snapshot = captured(module)
    first = draw()
    assert draw() != first
    snapshot.restore()
    assert draw() == first


def test_an_attribute_that_is_set_or_deleted_is_put_back() -> None:
    module = Holder(1)
    snapshot = captured(module)
    module.last = torch.zeros(1)
    del module.held
    snapshot.restore()
    assert module.held == 1
    assert not hasattr(module, "last")


@pytest.mark.parametrize(
    "make",
    [
        lambda: iter([1, 2]),
        lambda: itertools.count(),
        lambda: (i for i in range(3)),
        lambda: iter([1]).__next__,
        threading.Lock,
        lambda: np.array([[1], None], dtype=object),
        lambda: torch.optim.SGD([torch.zeros(1)]),
        random.SystemRandom,
        lambda: torch.eye(2).to_sparse(),
    ],
)
def test_what_can_not_be_compared_is_named(make: Any) -> None:
    assert list(captured(Holder([make()])).opaque) == ["held"]


@pytest.mark.parametrize(
    "held", [1, "a", (1, 2), torch.float32, np.float64(1), range(3), slice(1), print, len, Holder, random.random, None]
)
def test_values_are_no_state(held: Any) -> None:
    snapshot = captured(Holder(held))
    assert not snapshot.opaque
    random.random()
    assert not list(snapshot.differences())


def test_managed_tensors_are_left_alone_where_modules_keep_them() -> None:
    module = Holder()
    snapshot = captured(module)
    with torch.no_grad():
        module.net.weight.add_(1)
    assert not snapshot.aliases
    assert not list(snapshot.differences())


@pytest.mark.parametrize("hold", [lambda own: [own.weight], lambda own: own.weight.detach()[0], lambda own: own.weight])
def test_another_way_to_a_managed_tensor_is_named(hold: Any) -> None:
    module = Holder()
    object.__setattr__(module, "held", hold(module.net))
    assert captured(module).aliases == ["held"]


def test_objects_that_others_look_after_are_left_alone() -> None:
    module = Holder(Meter())
    snapshot = capture(module, module.parameters(), known=[module.held])
    module.held.update()
    assert not list(snapshot.differences())
    assert capture(Holder(Meter()), outside=(Meter,)).opaque == {"held": "Meter"}


def test_ignored_names_may_change() -> None:
    module = Holder(1)
    snapshot = capture(module, ignored=lambda owner: ("held", "new") if owner is module else ())
    module.held, module.new = 2, 3
    assert not list(snapshot.differences())
    snapshot.restore()
    assert (module.held, module.new) == (2, 3)


@pytest.mark.parametrize(
    "make",
    [
        lambda: iter([1, 2, 3]),
        lambda: iter((torch.zeros(2), torch.ones(2), torch.ones(1))),
        lambda: iter(range(5)),
        itertools.count,
        lambda: itertools.cycle([1, 2]),
        lambda: zip([1, 2, 3], "abc", strict=True),
        lambda: enumerate("abc"),
        lambda: itertools.islice(itertools.count(), 5),
    ],
)
@pytest.mark.parametrize("num_taken", [1, 2])
def test_iterators_go_back_to_where_they_were(make: Callable[[], Any], num_taken: int) -> None:
    module = Holder([make()])
    next(module.held[0])
    snapshot, others = captured(module), make()
    next(others)
    expected = next(others)
    for _ in range(2):
        for _ in range(num_taken):
            next(module.held[0])
        assert snapshot.has_changed()
        snapshot.restore()
        assert str(next(module.held[0])) == str(expected)
        snapshot.restore()


def test_iterators_that_can_not_be_copied_are_named() -> None:
    module = Holder(
        {"draws": (i for i in range(3)), "both": zip((i for i in [1]), [2], strict=True), "fine": iter([1])}
    )
    assert captured(module).iterators == {"held": "zip"} | {"held": "generator"} or len(captured(module).iterators)


def test_objects_that_hold_a_handle_are_left_alone() -> None:
    class Run:
        def __init__(self) -> None:
            self.lock, self.count = threading.Lock(), 0

    module = Holder([Run()])
    snapshot = captured(module)
    module.held[0].count += 1
    assert not snapshot.has_changed()
    assert snapshot.opaque == {"held": "Run"}


def test_what_has_changed_is_named_with_the_keys_of_dicts() -> None:
    module = Holder({"a": 1, "b": [2]})
    snapshot = captured(module)
    module.held["a"] += 1
    module.held["b"].append(3)
    module.new = 1
    assert snapshot.has_changed()
    assert {name for part in snapshot.parts if part.has_changed() for name in part.changes()} == {
        *("held.a", "held", "new")
    }
    snapshot.restore()
    assert not snapshot.has_changed()


def test_without_code_only_data_are_captured() -> None:
    count = 0

    def step() -> None:
        nonlocal count
        count += 1
        Shared.count += 1

    module = Holder([step, Shared])
    snapshot = capture(module, module.parameters(), reads_code=False)
    step()
    assert not snapshot.has_changed()
    snapshot.restore()
    assert count == 1
