"""Every partitioner through every property: a new partitioner is one entry in ``ENTRIES``."""

from __future__ import annotations

import json
import math
import pickle
import random
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, TensorDataset

from lightning_fl.data.partitioners import (
    IID,
    Dirichlet,
    DirichletSizes,
    FeatureNoise,
    LabelsPerClient,
    LognormalSizes,
    MappingFile,
    NaturalColumn,
    Partitioner,
    Shards,
)
from tests.contract.helpers import from_yaml, shipped

NUM_CLIENTS, NUM_SAMPLES = 7, 210
OWNERS = np.random.default_rng(0).permutation(np.arange(NUM_SAMPLES) % NUM_CLIENTS)
TARGETS: dict[str, Tensor] = {
    "labels": torch.arange(NUM_SAMPLES) % 10,
    "numbers": torch.linspace(-1, 1, NUM_SAMPLES, dtype=torch.float64),
    "several labels": torch.arange(NUM_SAMPLES)[:, None] % torch.arange(2, 8) == 0,
}
KINDS = tuple(TARGETS)


class Shops(TensorDataset):
    """Features, targets, and a shop for each sample."""

    def __init__(self, targets: Tensor = TARGETS["labels"]) -> None:
        super().__init__(torch.arange(len(targets), dtype=torch.float32)[:, None], targets)
        self.shop = [f"shop {owner}" for owner in OWNERS[: len(targets)]]


@dataclass(frozen=True)
class Entry:
    """A partitioner under contract.

    Args:
        kind: The partitioner.
        init_args: Its arguments, as YAML gives them; a dict with ``class_path`` stands for an object.
        wrong: Arguments that it refuses, each with the pattern of the message.
        is_random: Whether the split depends on the seed.
        names_clients: Whether the data says who the clients are.
        many: Arguments that suit thousands of clients with few samples each; None: as they are.
    """

    kind: type[Partitioner]
    init_args: dict[str, Any] = field(default_factory=dict)
    wrong: Sequence[tuple[dict[str, Any], str]] = ()
    is_random: bool = True
    names_clients: bool = False
    many: dict[str, Any] | None = None

    def make(self, init_args: dict[str, Any] | None = None) -> Partitioner:
        return self.kind(**(self.init_args if init_args is None else init_args))

    def split(self, dataset: Any = None, num_clients: int | None = NUM_CLIENTS, seed: int = 0) -> list[Tensor]:
        return self.make()(Shops() if dataset is None else dataset, num_clients, seed)


WRONG_ALPHAS = [
    *(({"alpha": alpha}, f"alpha={alpha} must be positive and finite") for alpha in (0.0, -1.0, math.nan)),
    ({"alpha": math.inf}, r"alpha=inf .* use IID\(\)"),
]
ENTRIES = {
    "iid": Entry(IID),
    "dirichlet": Entry(
        Dirichlet,
        {"alpha": 0.3},
        [
            *WRONG_ALPHAS,
            ({"alpha": 1.0, "per": "party"}, "per='party' is unknown; 'class' .* 'client'"),
            ({"alpha": 1.0, "min_size": -1}, "min_size=-1 must be at least 0"),
            ({"alpha": 1.0, "max_tries": 0}, "max_tries=0 must be at least 1"),
        ],
        many={"alpha": 0.3, "min_size": 0},
    ),
    "dirichlet-client": Entry(Dirichlet, {"alpha": 0.3, "per": "client"}),
    "shards": Entry(Shards, {"shards_per_client": 3}, [({"shards_per_client": 0}, "shards_per_client=0 must be")]),
    "labels": Entry(
        LabelsPerClient,
        {"num_labels": 4, "sigma": 1.0},
        [
            ({"num_labels": 0}, "num_labels=0 and min_per_label=1 must be"),
            ({"num_labels": 2, "sigma": -1}, "sigma=-1 must be"),
            ({"num_labels": 2, "min_per_label": 0}, "num_labels=2 and min_per_label=0 must be"),
        ],
        many={"num_labels": 4, "sigma": 0.5},
    ),
    "dirichlet-sizes": Entry(
        DirichletSizes,
        {"alpha": 0.5},
        [
            *WRONG_ALPHAS,
            ({"alpha": 1.0, "min_size": -1}, "min_size=-1 must be at least 0"),
        ],
    ),
    "lognormal-sizes": Entry(
        LognormalSizes,
        {"sigma": 1.0},
        [({"sigma": -1.0}, "sigma=-1.0 must be"), ({"sigma": 1.0, "min_size": -1}, "min_size=-1 must be at least 0")],
    ),
    "feature-noise": Entry(
        FeatureNoise,
        {"sigma": 0.1},
        [({"sigma": -0.1}, r"sigma=-0\.1 must be"), ({"sigma": math.inf}, "sigma=inf must be")],
    ),
    "column": Entry(NaturalColumn, {"name": "shop"}, is_random=False, names_clients=True),
    "file": Entry(MappingFile, {"path": "clients.json"}, is_random=False, names_clients=True),
}
every_partitioner = pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)


def named(names_clients: bool) -> Any:
    found = {name: entry for name, entry in ENTRIES.items() if entry.names_clients == names_clients}
    return pytest.mark.parametrize("entry", found.values(), ids=found)


@pytest.fixture(autouse=True)
def clients_file(clean_process: None) -> None:
    """The file that :class:`MappingFile` reads, in the test's own folder."""
    clients = {f"client {client}": np.flatnonzero(client == OWNERS).tolist() for client in range(NUM_CLIENTS)}
    Path("clients.json").write_text(json.dumps(clients))


def test_every_shipped_partitioner_is_under_contract() -> None:
    assert {entry.kind for entry in ENTRIES.values()} == shipped(Partitioner, "lightning_fl.data.partitioners")


@every_partitioner
@pytest.mark.parametrize("targets", KINDS)
def test_every_sample_goes_to_exactly_one_client(entry: Entry, targets: str) -> None:
    """Whatever the targets: class labels, numbers, or several labels a sample."""
    parts = entry.split(Shops(TARGETS[targets]))
    assert len(parts) == NUM_CLIENTS
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(NUM_SAMPLES))


@every_partitioner
def test_indices_are_sorted_int64_vectors(entry: Entry) -> None:
    for part in entry.split():
        assert part.dtype == torch.int64
        assert part.dim() == 1
        assert bool((part.diff() > 0).all())


@every_partitioner
def test_each_client_has_an_id_and_the_parts_stand_in_their_order(entry: Entry) -> None:
    partitioner, dataset = entry.make(), Shops()
    assert partitioner.names_clients == entry.names_clients
    ids = list(partitioner.client_ids(dataset, None if entry.names_clients else NUM_CLIENTS))
    assert len(set(ids)) == len(ids) == len(partitioner(dataset, NUM_CLIENTS))
    if entry.names_clients:
        for client, part in zip(ids, partitioner(dataset), strict=True):
            assert {f"{client.split()[0]} {owner}" for owner in OWNERS[part]} == {client}
    else:
        assert ids == list(range(NUM_CLIENTS))
        assert len(partitioner(dataset)) == len(partitioner.client_ids(dataset)) == 10


@every_partitioner
def test_the_seed_decides(entry: Entry) -> None:
    """Equal seeds give equal splits, and others another one, unless the data says whose each sample is."""
    first, again, other = (entry.split(seed=seed) for seed in (1, 1, 2))
    assert all(map(torch.equal, first, again))
    assert all(map(torch.equal, first, other)) == (not entry.is_random)


@every_partitioner
def test_the_global_generators_stay_as_they_are(entry: Entry) -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    dataset = Shops()
    part = entry.split(dataset)[3]
    entry.make().client_dataset(dataset, part, 3, NUM_CLIENTS, 0)[0]
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert random.getstate() == before[2]


@every_partitioner
def test_it_does_not_depend_on_the_global_generators(entry: Entry) -> None:
    splits = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        splits.append(entry.split())
    assert all(map(torch.equal, *splits))


@every_partitioner
def test_a_client_sees_its_samples_in_order(entry: Entry) -> None:
    """Its targets are those of the data set; its features too, unless the partitioner says that it changes examples."""
    partitioner, dataset = entry.make(), Shops()
    for client, part in enumerate(entry.split(dataset)):
        own, again = (partitioner.client_dataset(dataset, part, client, NUM_CLIENTS, 0) for _ in range(2))
        assert len(own) == len(part)  # type: ignore[arg-type]
        features = torch.cat([own[index][0] for index in range(len(part))])
        assert torch.equal(features, torch.cat([again[index][0] for index in range(len(part))]))
        assert torch.equal(features, part.float()) == (not partitioner.changes_examples)
        assert [int(own[index][1]) for index in range(len(part))] == TARGETS["labels"][part].tolist()


@named(False)
def test_one_client_gets_everything(entry: Entry) -> None:
    four_labels = Shops(TARGETS["labels"] % 4)  # as many as the client of LabelsPerClient takes
    (part,) = entry.split(four_labels, num_clients=1)
    assert torch.equal(part, torch.arange(NUM_SAMPLES))


@every_partitioner
@pytest.mark.parametrize("num_clients", [0, -1, NUM_SAMPLES + 1])
def test_a_number_of_clients_that_does_not_fit_is_refused(entry: Entry, num_clients: int) -> None:
    names = f"num_clients={num_clients} does not fit .* names 7 clients; leave num_clients out"
    plain = f"num_clients={num_clients} does not fit a data set of {NUM_SAMPLES} samples.*Change num_clients"
    with pytest.raises(ValueError, match=names if entry.names_clients and num_clients > 0 else plain):
        entry.split(num_clients=num_clients)


@named(True)
@pytest.mark.parametrize("num_clients", [None, NUM_CLIENTS])
def test_a_number_of_clients_may_be_left_out_where_the_data_names_them(entry: Entry, num_clients: int | None) -> None:
    assert all(map(torch.equal, entry.split(num_clients=num_clients), entry.split()))


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        yield from range(NUM_SAMPLES)


@every_partitioner
def test_a_stream_is_refused(entry: Entry) -> None:
    with pytest.raises(ValueError, match=r"Stream cannot be partitioned: .*map-style .*ClientLoaders"):
        entry.split(Stream())


@pytest.mark.parametrize(
    ("entry", "wrong", "message"),
    [
        pytest.param(e, wrong, message, id=f"{name}-{wrong}")
        for name, e in ENTRIES.items()
        for wrong, message in e.wrong
    ],
)
def test_wrong_arguments_are_refused(entry: Entry, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        entry.make(wrong)


@named(False)
def test_ten_thousand_clients_are_quick(entry: Entry) -> None:
    labels = torch.arange(60_000) % 10
    start = time.process_time()
    parts = entry.make(entry.many)(TensorDataset(torch.zeros(len(labels), 1), labels), 10_000)
    assert time.process_time() - start < 10
    assert len(parts) == 10_000


@every_partitioner
def test_it_is_frozen_and_pickles(entry: Entry) -> None:
    partitioner = entry.make()
    assert type(partitioner).__dataclass_params__.frozen  # type: ignore[attr-defined]
    copied = pickle.loads(pickle.dumps(partitioner))
    assert copied == partitioner
    assert hash(copied) == hash(partitioner)
    assert re.match(rf"{entry.kind.__name__}\(", str(partitioner))
    assert all(map(torch.equal, copied(Shops(), NUM_CLIENTS), entry.split()))


@every_partitioner
def test_yaml_gives_it_by_its_short_class_name(entry: Entry) -> None:
    assert from_yaml(Partitioner, entry.kind.__name__, entry.init_args) == entry.make()


def test_yaml_gives_a_partitioner_inside_another() -> None:
    inside = {"class_path": "Shards", "init_args": {"shards_per_client": 3}}
    found = from_yaml(Partitioner, "FeatureNoise", {"sigma": 0.1, "partitioner": inside})
    assert found == FeatureNoise(0.1, Shards(3))


# ---- partitioners that break their contract, so that each property is known to find something


class OnePartMore(IID):
    def split(self, dataset: Any, num_clients: int, rng: np.random.Generator) -> Sequence[np.ndarray]:
        return super().split(dataset, num_clients + 1, rng)


class OnePartLess(IID):
    def split(self, dataset: Any, num_clients: int, rng: np.random.Generator) -> Sequence[np.ndarray]:
        return super().split(dataset, num_clients - 1, rng)


class Unsorted(IID):
    def __call__(self, dataset: Any, num_clients: int | None = None, seed: int = 0) -> list[Tensor]:
        return [part.flip(0) for part in super().__call__(dataset, num_clients, seed)]


class IgnoresTheSeed(IID):
    def split(self, dataset: Any, num_clients: int, rng: np.random.Generator) -> Sequence[np.ndarray]:
        return super().split(dataset, num_clients, np.random.default_rng(0))


class DrawsGlobally(IID):
    def split(self, dataset: Any, num_clients: int, rng: np.random.Generator) -> Sequence[np.ndarray]:
        return np.array_split(np.random.permutation(len(dataset)), num_clients)


class ChangesQuietly(FeatureNoise):
    changes_examples = False


class NamesOthers(NaturalColumn):
    def client_ids(self, dataset: Any, num_clients: int | None = None) -> Sequence[Any]:
        return super().client_ids(dataset, num_clients)[::-1]


@pytest.mark.parametrize(
    ("entry", "check"),
    [
        (Entry(Unsorted), test_indices_are_sorted_int64_vectors),
        (Entry(IgnoresTheSeed), test_the_seed_decides),
        (Entry(DrawsGlobally), test_the_seed_decides),
        (Entry(DrawsGlobally), test_the_global_generators_stay_as_they_are),
        (Entry(DrawsGlobally), test_it_does_not_depend_on_the_global_generators),
        (Entry(ChangesQuietly, {"sigma": 0.1}), test_a_client_sees_its_samples_in_order),
        (
            replace(ENTRIES["column"], kind=NamesOthers),
            test_each_client_has_an_id_and_the_parts_stand_in_their_order,
        ),
    ],
)
def test_a_breach_is_found(entry: Entry, check: Callable[[Entry], None]) -> None:
    with pytest.raises(AssertionError):
        check(entry)


@pytest.mark.parametrize(("kind", "message"), [(OnePartMore, "8 parts for 7"), (OnePartLess, "6 parts for 7")])
def test_another_number_of_parts_than_clients_is_refused(kind: type[Partitioner], message: str) -> None:
    with pytest.raises(ValueError, match=rf"{message} clients; .*override `client_ids`"):
        kind()(Shops(), NUM_CLIENTS)
