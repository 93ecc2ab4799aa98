"""The federation's model in the files of its folder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightning_fl.coordinator.store import Store
from lightning_fl.federation import FederationSettings, FederationState
from lightning_fl.tree import flatten, to_sum_dtype, unflatten
from lightning_fl.types import Tree, Update

FORMAT = 1


@dataclass(frozen=True)
class Model:
    """The federation's state between rounds, and what it was saved as.

    Args:
        state: The server's state.
        buffers: The shared buffers.
        shared: Digest of what clients load: the model and what the algorithm's clients read.
        private: Digest of the rest; it never leaves the coordinator.
    """

    state: FederationState
    buffers: Tree
    shared: str
    private: str


class ModelFiles:
    """Writes models into a federation's folder, and reads them back.

    Args:
        store: The folder.
        settings: The federation's settings.
    """

    def __init__(self, store: Store, settings: FederationSettings) -> None:
        self.store, self.settings = store, settings

    def begin(self, params: Tree) -> FederationState:
        """The state with which all begins."""
        server = self.settings.algorithm.server_init(to_sum_dtype(params), self.settings.population)
        return FederationState(server, [{} for _ in self.settings.transforms])

    def write(self, state: FederationState, buffers: Tree) -> Model:
        """Writes the files of a model, and reads it back from them."""
        keys = self.settings.algorithm.client_keys
        seen = {key: value for key, value in state.server.items() if key in keys}
        rest = {key: value for key, value in state.server.items() if key not in keys}
        transforms = {str(index): own for index, own in enumerate(state.transforms)}
        shared, private = {"server": seen, "buffers": buffers}, {"server": rest, "transforms": transforms}
        digest = self.store.write_state(flatten(shared))
        return self.read(digest, self.store.write_state(flatten({**private, "memory": state.memory})))

    def commit(self, model: Model, round: int, start: str | None, progress: Any) -> None:
        """Makes a model the federation's.

        Args:
            model: What :meth:`write` returned.
            round: The round that comes next.
            start: Digest of the file with which all began.
            progress: What else is to be found after a restart, a data class.
        """
        digests = {"start": start, "shared": model.shared, "private": model.private}
        self.store.commit({"format": FORMAT, "round": round, **digests, "progress": vars(progress)})

    def read(self, shared: str, private: str) -> Model:
        """Reads a model from its files, whose pages are in memory only while they are used."""
        seen, rest = (unflatten(self.store.read_state(digest)) for digest in (shared, private))
        saved = rest.get("transforms", {})
        transforms = [saved.get(str(index), {}) for index in range(len(self.settings.transforms))]
        server = {**seen["server"], **rest.get("server", {})}
        state = FederationState(server, transforms, memory=rest.get("memory", {}))
        return Model(state, seen.get("buffers", {}), shared, private)

    def start_of(self, shared: str) -> Update:
        """The parameters and buffers from which a client has started."""
        trees = unflatten(self.store.read_state(shared))
        return Update(trees["server"]["params"], to_sum_dtype(trees.get("buffers", {})))
