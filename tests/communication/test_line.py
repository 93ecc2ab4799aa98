"""Lines between the ranks of a launch, both ends in one process."""

from __future__ import annotations

import socket
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
from torch import Tensor

from lightning_fl.communication.group import RankLost
from lightning_fl.communication.line import Meeting
from tests.helpers.distributed import PATIENCE


class ByMethod:
    """Reads a field that a caller may have left out."""

    limit = 100

    def __init__(self) -> None:
        self.gone = threading.Event()

    def answer(self, rank: int, fields: Mapping[str, Any], body: Tensor) -> tuple[Mapping[str, Any], Tensor]:
        return {"method": fields["method"]}, body

    def lost(self, rank: int) -> None:
        self.gone.set()


class First(dict[str, int]):
    """Every meeting of this process is its first, so that both ends meet."""

    def __missing__(self, run: str) -> int:
        return 0

    def __setitem__(self, run: str, number: int) -> None:
        pass


def test_a_call_that_cant_be_answered_ends_its_line_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_fl.communication.rendezvous._meetings", First())
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    with ThreadPoolExecutor(2) as pool:
        first, other = pool.map(lambda rank: Meeting(rank, 2, "127.0.0.1", port, timedelta(seconds=PATIENCE)), (0, 1))
    called = ByMethod()
    lines, line = first.listen("gloo", called), other.line("gloo")
    try:
        assert line.call({"method": "look"})[0] == {"method": "look"}
        with pytest.raises(RankLost):
            line.call({"look": 1})
        assert called.gone.wait(PATIENCE)
    finally:
        line.close()
        lines.close()
