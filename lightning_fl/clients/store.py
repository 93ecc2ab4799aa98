"""Where clients' states live between their rounds."""

from __future__ import annotations

from lightning_fl.types import ClientId, State


class MemoryStore:
    """Client states in memory: one entry for every client that has taken part."""

    def __init__(self) -> None:
        self._states: dict[ClientId, State] = {}

    def get(self, client: ClientId) -> State | None:
        """The client's state, or None before its first round."""
        return self._states.get(client)

    def put(self, client: ClientId, state: State) -> None:
        """Keeps the client's next state."""
        self._states[client] = state

    def __len__(self) -> int:
        return len(self._states)
