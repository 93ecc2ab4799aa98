from __future__ import annotations

import gc
import tempfile
from pathlib import Path

import pytest
import torch

from lightning_fl.clients import ClientStore
from lightning_fl.clients.state_files import StateFiles
from lightning_fl.types import State

CLIENTS = ["a", "b", 0, "0"]


def state(value: float) -> State:
    """A state of 16 bytes."""
    return {"algorithm": {"control": {"w": torch.full((2,), value, dtype=torch.float64)}}}


def value_of(store: ClientStore, client: int | str) -> float | None:
    found = store.get(client)
    return None if found is None else found["algorithm"]["control"]["w"][0].item()


@pytest.fixture
def files(tmp_path: Path) -> StateFiles:
    return StateFiles(tmp_path / "client_states")


def test_a_client_has_no_state_before_its_first_round() -> None:
    assert ClientStore().get("a") is None
    assert len(ClientStore()) == 0


@pytest.mark.parametrize("memory_limit", [0, 16, 32, 10**6])
def test_the_last_state_of_each_client_is_kept_in_memory_or_on_disk(memory_limit: int) -> None:
    store = ClientStore(memory_limit)
    for round in range(3):
        for index, client in enumerate(CLIENTS):
            assert value_of(store, client) == (10 * (round - 1) + index if round else None)
            store.put(client, state(10 * round + index))
            assert store.num_bytes_in_memory <= max(memory_limit, 16)
    assert [value_of(store, client) for client in CLIENTS] == [20, 21, 22, 23]
    assert len(store) == len(CLIENTS)


def test_the_limit_holds_for_the_states_of_a_round_that_is_not_over_too() -> None:
    store = ClientStore(memory_limit=64)
    for index, client in enumerate(CLIENTS):
        store.put(client, state(index))
    for index, client in enumerate(CLIENTS):
        store.stage(client, state(10 + index))
        assert store.num_bytes_in_memory <= 64 + 16
        assert value_of(store, client) == index
    assert [value_of(store, client) for client in CLIENTS] == [0, 1, 2, 3]
    store.commit()
    assert store.num_bytes_in_memory <= 64
    assert [value_of(store, client) for client in CLIENTS] == [10, 11, 12, 13]


def test_the_temporary_folder_goes_with_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    store = ClientStore(memory_limit=0)
    for index, client in enumerate(CLIENTS * 2):
        store.put(client, state(index))
    assert len(list(tmp_path.rglob("*.safetensors"))) == len(CLIENTS) - 1
    del store
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_the_least_recently_used_state_leaves_memory_first() -> None:
    store = ClientStore(memory_limit=32)
    kept = {client: state(index) for index, client in enumerate(CLIENTS[:3])}
    store.put("a", kept["a"])
    store.put("b", kept["b"])
    store.get("a")
    store.put(0, kept[0])
    assert store.get("a") is kept["a"]
    assert store.get(0) is kept[0]
    assert store.get("b") is not kept["b"]


@pytest.mark.parametrize("memory_limit", [0, 10**6])
def test_a_saved_store_is_restored_whatever_came_later(files: StateFiles, memory_limit: int) -> None:
    store = ClientStore(memory_limit)
    for index, client in enumerate(CLIENTS):
        store.put(client, state(index))
    manifest = store.save(files)
    for client in CLIENTS:
        store.put(client, state(100))
    later = store.save(files)
    assert later.keys() == manifest.keys() == set(CLIENTS)
    for restored in (store, ClientStore(memory_limit)):
        restored.restore(files, manifest)
        assert [value_of(restored, client) for client in CLIENTS] == [0, 1, 2, 3]
        assert len(restored) == len(CLIENTS)
    store.restore(files, later)
    assert [value_of(store, client) for client in CLIENTS] == [100] * 4


def test_states_that_did_not_change_are_not_written_again(files: StateFiles) -> None:
    store = ClientStore()
    for index, client in enumerate(CLIENTS):
        store.put(client, state(index))
    first = store.save(files)
    store.put("a", state(7))
    second = store.save(files)
    assert {client for client in CLIENTS if first[client] != second[client]} == {"a"}
    assert store.save(files) == second


def test_a_store_moves_to_another_folder(files: StateFiles, tmp_path: Path) -> None:
    store = ClientStore(memory_limit=0)
    for index, client in enumerate(CLIENTS):
        store.put(client, state(index))
    store.save(files)
    other = StateFiles(tmp_path / "other")
    restored = ClientStore()
    restored.restore(other, store.save(other))
    assert [value_of(restored, client) for client in CLIENTS] == [0, 1, 2, 3]


def test_a_ledger_stays_whatever_becomes_of_the_round(files: StateFiles) -> None:
    store, first, second = ClientStore(), torch.tensor([1]), torch.tensor([2])
    store.record("a", first)
    store.stage("a", state(1.0))
    store.roll_back()
    assert store.get("a") == {"ledger": first}
    store.record("a", second)
    store.stage("a", state(3.0))
    store.commit()
    assert value_of(store, "a") == 3.0
    assert (store.get("a") or {})["ledger"] is second
    other = ClientStore()
    other.restore(files, store.save(files))
    assert torch.equal((other.get("a") or {})["ledger"], second)
