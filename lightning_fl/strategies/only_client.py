"""The optimizer of a federation's only client, whose state is the live one between rounds as in a plain Trainer."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lightning_fl.clients import ClientStore
from lightning_fl.engines.kept_optimizers import load_kept
from lightning_fl.engines.optimizer_states import OptimizerStates
from lightning_fl.engines.phases import optimizer_entry
from lightning_fl.types import ClientId, Tree

ENTRY = optimizer_entry(0)


def show_kept(optimizers: OptimizerStates, store: ClientStore, client: ClientId) -> None:
    """Lets hooks between rounds see the state that the client keeps."""
    kept = (store.get(client) or {}).get(ENTRY)
    if kept is not None:
        load_kept(kept, optimizers.optimizers)


def take_changes(optimizers: OptimizerStates, store: ClientStore, client: ClientId) -> None:
    """Lets the client keep what hooks have changed in the state since the last round."""
    state: Mapping[str, Tree] = store.get(client) or {}
    kept = state.get(ENTRY)
    if kept is None and optimizers.are_fresh:
        return
    live = optimizers.keep()
    if kept is None or not _same(kept, live):
        store.put(client, {**state, ENTRY: live})


def _same(kept: Tree, live: Tree) -> bool:
    # A stored state may be on the CPU. NaN differs from itself, and then the live state is taken, which is the same.
    return kept.keys() == live.keys() and all(torch.equal(kept[n].to(own.device), own) for n, own in live.items())
