"""The federation's model out of the coordinator's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning_fl.coordinator import wire
from lightning_fl.coordinator.disk import read_json
from lightning_fl.tree import cast_like, unflatten
from lightning_fl.types import Tree


def read_model(folder: Path) -> tuple[Tree, dict[str, Any]]:
    """The newest model as a ``state_dict``; personal tensors have the values with which all began.

    Returns:
        The ``state_dict``, and the number of finished rounds as ``round`` with ``global_step``.

    Raises:
        ValueError: If the folder holds no model.
    """
    commit = read_json(folder / "state.json")
    if not commit:
        raise ValueError(f"{folder} holds no model: no silo has joined yet, or it is not a coordinator's folder.")

    def read(digest: str) -> dict[str, Any]:
        return unflatten(wire.read(folder / "states" / f"{digest}.safetensors"))

    start, shared = read(commit["start"]), read(commit["shared"])
    held = {**start.get("rest", {}), **start.get("buffers", {}), **start["params"]}
    newest = {**shared.get("buffers", {}), **shared["server"]["params"]}
    state_dict = {name: cast_like(newest.get(name, value), value) for name, value in held.items()}
    return state_dict, {"round": commit["round"], "global_step": commit["progress"]["global_step"]}
