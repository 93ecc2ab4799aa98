"""What the ledgers of sample-level privacy must not forget: other fits, and other clients with the same example."""

from __future__ import annotations

import math
import time
import warnings
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, StackDataset, Subset, TensorDataset

import lightning_fl as fl
from lightning_fl.privacy import Gaussian, Ledger, Poisson
from lightning_fl.privacy.sample_level.shared_examples import SharedExamples, _Counts
from tests.helpers.privacy import fit, private
from tests.helpers.training import Plain, image_clients, images


def loaders(*datasets: object) -> fl.datamodules.ClientLoaders:
    return fl.datamodules.ClientLoaders([DataLoader(own, 8) for own in datasets])  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_same_examples_under_several_clients_are_found_and_counted() -> None:
    data = images(50)
    callback = private()
    with pytest.warns(UserWarning, match=r"An example appears [23] times in the clients' data"):
        run, _ = fit(callback, 2, Plain(), loaders(data, data, Subset(data, range(40))))
    logged = run.strategy.history[-1]["dp_epsilon"]  # type: ignore[attr-defined]
    apart = Ledger()
    apart.record(Gaussian(1.0, Poisson(8 / 50)), 2 * 7 * 2)
    apart.record(Gaussian(1.0, Poisson(8 / 40)), 2 * 5)
    alone, together = max(callback.epsilons(run).values()), max(callback.epsilons(run, group=3).values())
    # What the three clients reveal one after the other is no more than one of them would of three examples.
    assert alone < apart.epsilon(1e-5) <= logged
    assert together <= logged + 1e-6


@pytest.mark.slow
def test_clients_of_their_own_are_not_warned_of() -> None:
    data = images(60)
    fit(private(method="rdp"), 2, Plain(), loaders(Subset(data, range(30)), Subset(data, range(30, 60))))
    fit(private(method="rdp"), 2, Plain(), image_clients((20, 20, 20), 8))


def test_places_in_memory() -> None:
    shared, base = SharedExamples(), torch.zeros(100, 3)
    shared.add("a", TensorDataset(base[:50]))
    views = TensorDataset(base[50:])
    shared.add("b", views)
    assert shared.largest == 1
    overlapping = TensorDataset(base[90:])
    shared.add("c", overlapping)
    shared.add("c", overlapping)
    assert shared.largest == 2
    twice = SharedExamples()
    twice.add("a", Subset(views, [0, 1, 1]))
    twice.add("b", [1, 2, 3])
    assert twice.largest == 2


class Indexed(Dataset):
    """A data set that knows nothing of memory."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((3,), float(index))


ITEMS = [(torch.zeros(3), place) for place in range(20)]
WORDS = [{"text": f"{place} words"} for place in range(20)]
ROWS = torch.zeros(20, 3)


@pytest.mark.parametrize(
    "own", [Indexed(), TensorDataset(ROWS), ITEMS, WORDS, list(ROWS)], ids=["object", "tensor", "list", "dicts", "rows"]
)
@pytest.mark.parametrize(
    ("times", "clients"),
    [
        (4, lambda own: [ConcatDataset([own] * 4)]),
        (2, lambda own: [own, ConcatDataset([TensorDataset(torch.ones(5, 3)), own])]),
        (3, lambda own: [Subset(ConcatDataset([own, own]), [0, 20, 25, 25]), Subset(own, range(5))]),
        (2, lambda own: [Subset(own, [-1]), Subset(own, [19])]),
        (2, lambda own: [StackDataset(own, list(range(20))), StackDataset(text=own)]),
        (2, lambda own: [own, own]),
        (1, lambda own: [Subset(own, range(10)), Subset(ConcatDataset([own, own]), [10, 31])]),
        (1, lambda own: [Subset(own, range(10)), ConcatDataset([Subset(own, range(10, 20)), [1, 2, 2]])]),
    ],
)
def test_what_holds_data_sets_is_looked_through(own: Any, times: int, clients: Any) -> None:
    shared = SharedExamples()
    # Kept, as clients keep their data.
    held = clients(own)
    for _ in range(2):
        for client, data in enumerate(held):
            shared.add(client, data)
    assert shared.largest == times


def test_a_part_of_a_list_is_of_the_same_objects() -> None:
    shared = SharedExamples()
    parts = ITEMS[:12], ITEMS[8:]
    for client, part in enumerate(parts):
        shared.add(client, part)
    assert shared.largest == 2
    # Equal numbers are one object in Python, but not one example.
    numbers = SharedExamples()
    lists = [list(range(10)), list(range(10)), [1, 1, 1]]
    for client, part in enumerate(lists):
        numbers.add(client, part)
    assert numbers.largest == 1


def test_lists_that_nobody_else_has_are_freed() -> None:
    class Example:
        pass

    shared, kept = SharedExamples(), [Example()]
    shared.add("kept", kept)
    seen = []
    for client in range(20):
        data = [Example() for _ in range(5)]
        seen.append(weakref.ref(data[0]))
        shared.add(client, data)
    assert shared.largest == 1
    assert sum(own() is not None for own in seen) <= 2
    shared.add("again", kept)
    assert shared.largest == 2


def test_a_view_that_is_made_anew_is_counted_once() -> None:
    shared, base = SharedExamples(), torch.zeros(100, 3)
    for _ in range(3):
        shared.add("a", TensorDataset(base[:50]))
    held = TensorDataset(base[:50:2])
    for _ in range(3):
        shared.add("b", held)
        shared.add("b", TensorDataset(base[:50:2]))
    shared.add("c", TensorDataset(base[49:60]))
    assert shared.largest == 1
    shared.add("d", TensorDataset(base[48:49]))
    assert shared.largest == 2


def test_counts_by_brute_force() -> None:
    draws = np.random.default_rng(0)
    counts, seen = _Counts(), []
    for _ in range(60):
        seen.append(draws.integers(0, 300, draws.integers(0, 30)))
        largest = counts.add(seen[-1])
        everything = np.concatenate(seen)
        assert largest == max((int((everything == number).sum()) for number in seen[-1]), default=0)


@pytest.mark.slow
def test_the_time_grows_with_the_clients_and_not_with_their_square() -> None:
    data = images(4)

    def seconds(num_clients: int) -> float:
        shared, start = SharedExamples(), time.process_time()
        for client in range(num_clients):
            shared.add(client, Subset(data, [client % 4]))
        assert shared.largest == num_clients / 4
        own = TensorDataset(torch.zeros(50 * num_clients, 1))
        for client in range(num_clients):
            shared.add(f"own {client}", Subset(own, range(50 * client, 50 * client + 50)))
            shared.add(f"view {client}", TensorDataset(own.tensors[0][50 * client : 50 * client + 50]))
        return time.process_time() - start

    seconds(100)
    assert seconds(2000) < 4 * 4 * seconds(500)


def on_ranks() -> tuple[list[str], list[float], float]:
    data = images(50)
    callback = private(method="rdp", max_epsilon=1000.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run, _ = fit(callback, 2, Plain(), loaders(data, Subset(data, range(40)), images(30, 1)))
    history: Any = run.strategy.history  # type: ignore[attr-defined]
    told = [str(warning.message) for warning in caught if "times in the clients' data" in str(warning.message)]
    return told, [entry["dp_epsilon"] for entry in history], max(callback.epsilons(run).values(), default=0.0)


@pytest.mark.slow
def test_examples_that_clients_of_other_ranks_hold_are_found(run_ranks: Any) -> None:
    ((told, alone, _),) = run_ranks(1, on_ranks)
    ranks = run_ranks(2, on_ranks)
    assert len(told) == 1
    assert len(ranks[0][0]) == 1
    for _, logged, own in ranks:
        assert logged == alone
        assert own < logged[-1]


def test_what_is_freed_is_forgotten() -> None:
    shared = SharedExamples()
    for client in range(50):
        shared.add(client, TensorDataset(torch.zeros(100, 3)))
    assert shared.largest == 1


def test_a_second_fit_with_a_new_callback_is_warned_of() -> None:
    module = Plain()
    fit(private(method="rdp"), 1, module)
    with pytest.warns(UserWarning, match="start with new ledgers"):
        fit(private(method="rdp"), 1, module)
    fit(private(method="rdp"), 1, Plain())


@pytest.mark.slow
def test_the_budget_counts_the_copies() -> None:
    data = images(50)
    callback = private(max_epsilon=7.0)
    with pytest.warns(UserWarning, match="An example appears 2 times"):
        run, _ = fit(callback, 20, Plain(), loaders(data, data))
    assert len(run.strategy.history) < 20  # type: ignore[attr-defined]
    assert math.isfinite(run.strategy.history[-1]["dp_epsilon"])  # type: ignore[attr-defined]
