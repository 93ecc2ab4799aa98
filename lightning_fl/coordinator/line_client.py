"""A silo's calls to a coordinator in the first rank of its own launch."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_fl.communication.line import NOTHING, Line
from lightning_fl.coordinator import wire
from lightning_fl.coordinator.client import CallRefused


class LineClient:
    """Like :class:`~lightning_fl.coordinator.client.Client`, over a line instead of HTTPS.

    Args:
        line: The connection to the first rank.
    """

    address = "rank 0"

    def __init__(self, line: Line) -> None:
        self.line = line

    def close(self) -> None:
        """Does nothing: the line is closed by its owner."""

    def impatient(self) -> LineClient:
        """A client for calls that need not reach the coordinator."""
        return self

    def call(
        self, method: str, path: str, body: Any = None, read: Callable[[Any], Any] | None = None, data: Tensor = NOTHING
    ) -> tuple[int, Mapping[str, str], Any]:
        """See :meth:`~lightning_fl.coordinator.client.Client.call`; ``data`` are the bytes of a file."""
        answer, content = self.line.call({"method": method, "path": path, "json": body}, data)
        status, facts = int(answer["status"]), answer["facts"]
        if status >= 400:
            raise CallRefused(status, facts)
        found = content.numpy().tobytes()
        return status, facts, found if read is None else read(io.BytesIO(found))

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """Makes a call whose answer is JSON."""
        return self.call(method, path, body)[1]

    def upload(self, path: str, file: Path) -> None:
        """Sends a file."""
        data = torch.from_file(str(file), shared=False, size=file.stat().st_size, dtype=torch.uint8)
        self.call("PUT", f"{path}/{wire.sha256(file)}", data=data)

    def download(self, path: str, file: Path, digest: str) -> None:
        """Loads a file; its digest need not be checked, because nothing lies between the ranks."""
        self.call("GET", path, read=lambda found: file.write_bytes(found.getbuffer()))
