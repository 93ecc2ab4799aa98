from __future__ import annotations

import torch

from lightning_fl.clients import ClientStore


def test_a_client_has_no_state_before_its_first_round() -> None:
    assert ClientStore().get("a") is None
    assert len(ClientStore()) == 0


def test_the_last_state_of_each_client_is_kept() -> None:
    store = ClientStore()
    states = [{"algorithm": {"control": {"w": torch.full((1,), float(value))}}} for value in range(3)]
    for client, state in zip(["a", 0, "a"], states, strict=True):
        store.put(client, state)
    assert store.get("a") is states[2]
    assert store.get(0) is states[1]
    assert store.get("0") is None
    assert len(store) == 2
