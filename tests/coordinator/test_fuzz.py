"""Random and damaged calls with a good certificate: no undeclared error, and the federation trains on.

``make fuzz`` does it for ten minutes; FUZZ_SECONDS and FUZZ_SEED change how long and with which calls.
"""

from __future__ import annotations

import json
import logging
import os
import random
import socket
import ssl
import threading
import time
from pathlib import Path

import pytest
import torch
from aiohttp.http_exceptions import HttpProcessingError

from lightning_fl.coordinator import identity, wire
from lightning_fl.coordinator.audit import verify
from lightning_fl.coordinator.identity import Kit
from tests.helpers.distributed import PATIENCE
from tests.helpers.network import (
    HOST,
    LiveCoordinator,
    TinySilo,
    in_threads,
    live_coordinator,
    make_kits,
    rules,
    settings,
)

SECONDS = float(os.environ.get("FUZZ_SECONDS", "10"))
SEED = int(os.environ.get("FUZZ_SEED", "0"))
DECLARED = {200, 204, 206, 400, 403, 404, 405, 408, 409, 410, 411, 413, 416, 417, 422}
CALLS = (
    ("GET", "/v1/check"),
    ("POST", "/v1/join"),
    ("POST", "/v1/join"),
    ("GET", "/v1/rounds?after=-1"),
    ("GET", "/v1/states/{digest}"),
    ("GET", "/v1/rounds/{round}/update"),
    ("PUT", "/v1/rounds/{round}/update/{digest}"),
    ("PUT", "/v1/rounds/{round}/update/{digest}"),
    ("PUT", "/v1/rounds/{round}/update.0.share/{digest}"),
    ("PUT", "/v1/rounds/{round}/evaluation.0/{digest}"),
    ("PUT", "/v1/start/{digest}"),
    ("POST", "/v1/alive"),
    ("POST", "/v1/leave"),
)
JSON = (None, True, -1, 2**70, 1e308, "", "north", "\x00", [], {}, [[]], {"a": {"b": [None]}})


class Fuzzer:
    """Makes calls that a silo might make, and damages them.

    Args:
        seed: Of its random choices.
        folder: Where its files go.
    """

    def __init__(self, seed: int, folder: Path) -> None:
        self.random = random.Random(seed)
        self.file = folder / "fuzz.safetensors"
        self.num_calls = 0

    def call(self) -> bytes:
        """The bytes of a call."""
        content = self.content()
        digest = self.random.choice([self.text(), "0" * 64, wire.sha256(self.file)])
        method, path = self.random.choice(CALLS)
        path = path.format(digest=digest, round=self.random.choice([0, 0, 0, 1, -1, "x", 10**20]))
        if self.random.random() < 0.2:
            method = self.random.choice(["GET", "PUT", "POST", "HEAD", "DELETE", "X" * 20])
        lines = [f"{method} {path} HTTP/1.1", "Host: x", "Connection: close"]
        for name in ("Upload-Length", "Upload-Offset", "Content-Length", "Range"):
            good = {"Upload-Offset": 0, "Range": "bytes=0-"}.get(name, len(content))
            if self.random.random() < 0.9:
                value = good if self.random.random() < 0.9 else self.random.choice([-1, 0, 10**19, self.text()])
                lines.append(f"{name}: {value}")
        data = "\r\n".join([*lines, "", ""]).encode(errors="replace") + content
        return self.damaged(data) if self.random.random() < 0.2 else data

    def content(self) -> bytes:
        kind = self.random.randrange(4)
        if kind == 0:
            return json.dumps(self.value(3)).encode()
        if kind == 1:
            return self.random.randbytes(self.random.randrange(200))
        join = {"protocol": 1, "settings": {}, "common": {}, "manifest": self.value(2), "versions": {}}
        if kind == 2:
            join[self.random.choice(list(join))] = self.value(2)
            return json.dumps(join).encode()
        shape = self.random.choice([(3,), (3,), (4,), (0,), (1, 3)])
        dtype = self.random.choice([torch.float32, torch.int32, torch.float64])
        fields = {"report": self.value(2), "weight": self.value(0), "message": self.value(2), "common": {}}
        name = self.random.choice(["delta\x1fx", "params\x1fx", "report\x1fx", "a\x1fb\x1fc", "vector"])
        wire.write(self.file, {name: torch.full(shape, self.random.choice([1, 0]), dtype=dtype)}, fields)
        data = self.file.read_bytes()
        return self.damaged(data) if self.random.random() < 0.5 else data

    def value(self, depth: int) -> object:
        if depth and self.random.random() < 0.5:
            return {self.text(): self.value(depth - 1) for _ in range(self.random.randrange(4))}
        return self.random.choice(JSON)

    def text(self) -> str:
        return "".join(self.random.choice("aZ09./%\\\u00e9 \t{}[]\"'") for _ in range(self.random.randrange(12)))

    def damaged(self, data: bytes) -> bytes:
        content = bytearray(data)
        for _ in range(self.random.randrange(1, 6)):
            place = self.random.randrange(len(content) + 1)
            content[place : place + self.random.randrange(3)] = self.random.randbytes(self.random.randrange(4))
        return bytes(content)

    def run(self, live: LiveCoordinator, kit: Kit, seconds: float) -> set[int]:
        """Calls for a while; returns the statuses of the answers."""
        found, context = set(), identity.client_context(kit)
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self.num_calls += 1
            try:
                with (
                    socket.create_connection(("127.0.0.1", live.port), timeout=5) as plain,
                    context.wrap_socket(plain, server_hostname=HOST) as connection,
                ):
                    connection.settimeout(0.3)  # a call without an end is held, and this side goes
                    connection.sendall(self.call())
                    answer = connection.recv(1 << 16)
            except (TimeoutError, ConnectionError, ssl.SSLError):
                continue
            if answer:
                found.add(int(answer.split()[1]))
        return found


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 900)
def test_random_calls_meet_no_undeclared_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names = ("east", "north", "south", "zero")
    make_kits(tmp_path, names)
    # The one that fuzzes is a silo of the federation, but no other speaks for it.
    times = {"deadline_s": SECONDS + PATIENCE, "max_deadline_s": SECONDS + PATIENCE}
    with live_coordinator(tmp_path, rules(rounds=3, **times), settings()) as live:
        object.__setattr__(live.coordinator.rules, "silos", names)
        silos = [
            TinySilo(tmp_path, live.address, name, step).join() for name, step in zip(names, (1, 2, 6), strict=False)
        ]
        openings = in_threads(*(silo.open for silo in silos))
        fuzzer = Fuzzer(SEED, tmp_path)
        with caplog.at_level(logging.WARNING, "aiohttp"):
            found = fuzzer.run(live, Kit(tmp_path / "zero"), SECONDS)
        print(f"{fuzzer.num_calls} calls, statuses {sorted(found)}")
        assert found <= DECLARED, f"seed {SEED}"
        assert {200, 400, 422} <= found
        # What is no HTTP at all aiohttp answers with 400, and logs as an error.
        kinds = [record.exc_info[0] for record in caplog.records if record.exc_info]
        assert all(kind is not None and issubclass(kind, HttpProcessingError) for kind in kinds), kinds
        assert live.error is None
        live.coordinator.machine.leave("zero")
        sends = [
            lambda own=own, opening=opening: own.send(opening) for own, opening in zip(silos, openings, strict=True)
        ]
        assert in_threads(*sends) == [3.0] * 3
        verify(live.store.root / "audit.jsonl")
        assert threading.active_count() < 100
