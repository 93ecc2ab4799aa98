"""Where clients' states live between their rounds."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_fl.clients.state_files import Manifest, StateFiles
from lightning_fl.types import ClientId, State

DEFAULT_MEMORY_LIMIT = 1 << 29
LEDGER = "ledger"


class ClientStore:
    """The states of this rank's clients: in memory up to a limit, beyond it on disk.

    Args:
        memory_limit: Bytes of states that stay in memory, those staged included; the least recently used ones go to a
            temporary folder.
    """

    def __init__(self, memory_limit: int = DEFAULT_MEMORY_LIMIT) -> None:
        self.memory_limit = memory_limit
        self._loaded: OrderedDict[ClientId, State] = OrderedDict()
        self._num_bytes = 0
        self._staged: ClientStore | None = None
        self._files: dict[ClientId, tuple[StateFiles, str]] = {}
        self._scratch: StateFiles | None = None

    def get(self, client: ClientId) -> State | None:
        """The client's state, or None before its first round."""
        if client in self._loaded:
            self._loaded.move_to_end(client)
            return self._loaded[client]
        if client not in self._files:
            return None
        files, name = self._files[client]
        state = files.read(client, name)
        self._keep(client, state)
        return state

    def put(self, client: ClientId, state: State) -> None:
        """Keeps the client's next state."""
        self._drop(client)
        self._forget_file(client)
        self._keep(client, state)

    def stage(self, client: ClientId, state: State) -> None:
        """Keeps the client's next state aside until :meth:`commit`."""
        if self._staged is None:
            self._staged = ClientStore(self.memory_limit)
        self._staged.put(client, state)
        self._make_room()

    def commit(self) -> None:
        """The round is done: the staged states become those of their clients."""
        staged, self._staged = self._staged, None
        if staged is not None:
            for client in staged.clients():
                ledger = {name: value for name, value in (self.get(client) or {}).items() if name == LEDGER}
                self.put(client, {**ledger, **(staged.get(client) or {})})
                staged._drop(client)

    def record(self, client: ClientId, ledger: Tensor) -> None:
        """Keeps what has been spent of the client's privacy: at once, whatever becomes of the round."""
        self.put(client, {**(self.get(client) or {}), LEDGER: ledger})

    def roll_back(self) -> None:
        """The round is dropped, and the staged states with it."""
        self._staged = None

    def clients(self) -> list[ClientId]:
        """The clients that have a state."""
        return [*self._loaded, *(client for client in self._files if client not in self._loaded)]

    def __len__(self) -> int:
        return len(self.clients())

    @property
    def num_bytes_in_memory(self) -> int:
        """Bytes of the states that are in memory, those staged included."""
        return self._num_bytes + (0 if self._staged is None else self._staged.num_bytes_in_memory)

    def save(self, files: StateFiles) -> Manifest:
        """Makes sure that the folder holds the current state of each client, and names the versions."""
        for client in self.clients():
            if client not in self._files:
                self._files[client] = files, files.write(client, self._loaded[client])
            elif self._files[client][0].root != files.root:
                other, name = self._files[client]
                files.take(client, name, other)
                self._forget_file(client)
                self._files[client] = files, name
        return {client: name for client, (_, name) in self._files.items()}

    def restore(self, files: StateFiles, manifest: Manifest) -> None:
        """Goes back to saved states; they are read when they are asked for."""
        for client, name in manifest.items():
            self._drop(client)
            self._forget_file(client)
            self._files[client] = files, name

    def drop_entry(self, name: str) -> None:
        """Takes an entry such as ``"optimizer"`` out of all states."""
        for client in self.clients():
            state = self.get(client) or {}
            if name in state:
                self.put(client, {key: value for key, value in state.items() if key != name})

    def _keep(self, client: ClientId, state: State) -> None:
        self._loaded[client] = state
        self._num_bytes += _num_bytes(state)
        self._make_room()

    def _make_room(self) -> None:
        while self.num_bytes_in_memory > self.memory_limit and len(self._loaded) > 1:
            oldest = next(iter(self._loaded))
            if oldest not in self._files:
                scratch = self._scratch_files()
                self._files[oldest] = scratch, scratch.write(oldest, self._loaded[oldest])
            self._drop(oldest)

    def _scratch_files(self) -> StateFiles:
        if self._scratch is None:
            root = tempfile.mkdtemp(prefix="lightning_fl_states_")
            weakref.finalize(self, shutil.rmtree, root, ignore_errors=True)
            self._scratch = StateFiles(Path(root), durable=False)
        return self._scratch

    def _forget_file(self, client: ClientId) -> None:
        files, name = self._files.pop(client, (None, ""))
        if files is not None and files is self._scratch:
            files.remove(client, name)

    def _drop(self, client: ClientId) -> None:
        state = self._loaded.pop(client, None)
        if state is not None:
            self._num_bytes -= _num_bytes(state)


def _num_bytes(state: Mapping[str, Any]) -> int:
    return sum(
        value.numel() * value.element_size() if isinstance(value, Tensor) else _num_bytes(value)
        for value in state.values()
    )
