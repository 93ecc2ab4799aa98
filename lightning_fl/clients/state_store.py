"""Storage of client states between rounds."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections import OrderedDict
from pathlib import Path

from torch import Tensor

from lightning_fl.clients.state_files import Manifest, StateFiles
from lightning_fl.tree import leaves, num_bytes
from lightning_fl.types import ClientId, State

DEFAULT_MEMORY_LIMIT = 1 << 29
LEDGER = "ledger"


class ClientStore:
    """The states of this rank's clients: in memory up to a limit, on disk beyond it.

    A round's new states are staged first and replace the old ones in :meth:`commit`. So a round that fails leaves every
    client's state unchanged, and can be repeated.

    Args:
        memory_limit: Bytes of states to hold in memory, including staged ones; the least recently used states go to a
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
            # Order of last use, in which `_make_room` evicts.
            self._loaded.move_to_end(client)
            return self._loaded[client]
        if client not in self._files:
            return None
        files, name = self._files[client]
        state = files.read(client, name)
        self._keep(client, state)
        return state

    def put(self, client: ClientId, state: State) -> None:
        """Replaces the client's state."""
        self._drop(client)
        self._forget_file(client)
        self._keep(client, state)

    def stage(self, client: ClientId, state: State) -> None:
        """Stages the client's next state until :meth:`commit`."""
        if self._staged is None:
            self._staged = ClientStore(self.memory_limit)
        self._staged.put(client, state)
        self._make_room()

    def staged(self, client: ClientId) -> State | None:
        """The client's staged state with its ledger, as :meth:`commit` will store it. None if there is none."""
        if self._staged is None or self._staged.get(client) is None:
            return None
        return self._with_ledger(client, self._staged.get(client) or {})

    def _with_ledger(self, client: ClientId, state: State) -> State:
        # Staged states hold no ledger: it was recorded directly during the round, and is kept.
        ledger = {name: value for name, value in (self.get(client) or {}).items() if name == LEDGER}
        return {**ledger, **state}

    def commit(self) -> None:
        """Ends a round: the staged states replace the clients' states."""
        staged, self._staged = self._staged, None
        if staged is not None:
            for client in staged.clients():
                self.put(client, self._with_ledger(client, staged.get(client) or {}))
                # Dropped one by one, so that the round's states are not in memory twice.
                staged._drop(client)

    def record(self, client: ClientId, ledger: Tensor) -> None:
        """Stores a client's privacy ledger immediately, not staged: spent privacy stays spent if the round fails."""
        self.put(client, {**(self.get(client) or {}), LEDGER: ledger})

    def roll_back(self) -> None:
        """Drops the round: the staged states are discarded."""
        self._staged = None

    def clients(self) -> list[ClientId]:
        """The clients that have a state."""
        return [*self._loaded, *(client for client in self._files if client not in self._loaded)]

    def __len__(self) -> int:
        return len(self.clients())

    @property
    def num_bytes_in_memory(self) -> int:
        """Bytes of the states in memory, including staged ones."""
        return self._num_bytes + (0 if self._staged is None else self._staged.num_bytes_in_memory)

    def save(self, files: StateFiles) -> Manifest:
        """Writes each client's current state to the folder, unless it is there, and returns the manifest."""
        for client in self.clients():
            if client not in self._files:
                self._files[client] = files, files.write(client, self._loaded[client])
            elif self._files[client][0].root != files.root:
                other, name = self._files[client]
                # A checkpoint's folder must be complete without the folders of earlier checkpoints and without scratch
                # files.
                files.copy_from(other, client, name)
                self._forget_file(client)
                self._files[client] = files, name
        return {client: name for client, (_, name) in self._files.items()}

    def restore(self, files: StateFiles, manifest: Manifest) -> None:
        """Restores saved states; each is read when it is first needed."""
        for client, name in manifest.items():
            self._drop(client)
            self._forget_file(client)
            self._files[client] = files, name

    def drop_entry(self, name: str) -> None:
        """Removes an entry such as ``"optimizer"`` from all states."""
        for client in self.clients():
            state = self.get(client) or {}
            if name in state:
                self.put(client, {key: value for key, value in state.items() if key != name})

    def _keep(self, client: ClientId, state: State) -> None:
        self._loaded[client] = state
        self._num_bytes += num_bytes(leaves(state))
        self._make_room()

    def _make_room(self) -> None:
        # The last state stays even if it alone exceeds the limit: it is the one in use.
        while self.num_bytes_in_memory > self.memory_limit and len(self._loaded) > 1:
            oldest = next(iter(self._loaded))
            if oldest not in self._files:  # a state that a checkpoint has written need not be written again
                scratch = self._scratch_files()
                self._files[oldest] = scratch, scratch.write(oldest, self._loaded[oldest])
            self._drop(oldest)

    def _scratch_files(self) -> StateFiles:
        if self._scratch is None:
            root = tempfile.mkdtemp(prefix="lightning_fl_states_")
            # Not `__del__`: a finalizer also runs when the interpreter exits.
            weakref.finalize(self, shutil.rmtree, root, ignore_errors=True)
            self._scratch = StateFiles(Path(root), durable=False)
        return self._scratch

    def _forget_file(self, client: ClientId) -> None:
        files, name = self._files.pop(client, (None, ""))
        # Only scratch files: a version in a checkpoint's folder belongs to that checkpoint.
        if files is not None and files is self._scratch:
            files.remove(client, name)

    def _drop(self, client: ClientId) -> None:
        state = self._loaded.pop(client, None)
        if state is not None:
            self._num_bytes -= num_bytes(leaves(state))
