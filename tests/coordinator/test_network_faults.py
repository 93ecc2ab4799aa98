"""Faults that users of other frameworks met on real networks: each is one row of a table, named in its test."""

from __future__ import annotations

import errno
import glob
import http.client
import logging
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import time
from dataclasses import fields
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import web

from lightning_fl.communication import Message
from lightning_fl.coordinator import http_server, identity
from lightning_fl.coordinator.audit import AuditLog, verify
from lightning_fl.coordinator.client import CallRefused, Client
from lightning_fl.coordinator.disk import Disk
from lightning_fl.coordinator.identity import Authority, Kit, make_request
from lightning_fl.coordinator.machine import Rules
from lightning_fl.coordinator.store import Store
from tests.helpers.distributed import PATIENCE, REPOSITORY, run_script
from tests.helpers.network import (
    ENTRY,
    EVALUATION,
    HOST,
    NAMES,
    ConnectProxy,
    LiveCoordinator,
    Relay,
    TinySilo,
    in_threads,
    live_coordinator,
    make_kits,
    rules,
    settings,
    wait_until,
)

STEPS = {"east": 1.0, "north": 2.0, "south": 6.0}


def silos_at(live: LiveCoordinator, address: str | None = None) -> list[TinySilo]:
    return [TinySilo(live.folder, address or live.address, name, step).join() for name, step in STEPS.items()]


def models_of(silos: list[TinySilo]) -> list[list[float]]:
    return [list(models) for models in in_threads(*(silo.run for silo in silos))]


class Space:
    """Whether the coordinator's disk has space."""

    def __init__(self) -> None:
        self.is_full = False
        self.num_refused = 0

    def __call__(self, operation: str) -> None:
        if self.is_full:
            self.num_refused += 1
            raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("when", ["start", "opening", "training"])
@pytest.mark.spread(1)
def test_disk_full(folder: Path, when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Disk full: the coordinator answers 507 and lives, silos retry, nothing is committed before there is space."""
    monkeypatch.setattr(http_server, "DISK_S", 0.1)
    space = Space()
    with live_coordinator(folder, rules(), settings(), before=space) as live:
        silos = [TinySilo(folder, live.address, name, step) for name, step in STEPS.items()]
        results: list[Any] = []

        def train() -> None:
            if when == "start":
                in_threads(*(silo.join for silo in silos))
            if when != "training":
                results.extend(models_of(silos))
            else:
                sent = in_threads(*(lambda s=s, o=o: s.send(o) for s, o in zip(silos, openings, strict=True)))
                results.extend([first, *rest] for first, rest in zip(sent, models_of(silos), strict=True))

        if when != "start":
            in_threads(*(silo.join for silo in silos))
        openings = in_threads(*(silo.open for silo in silos)) if when == "training" else []
        space.is_full = True
        training = threading.Thread(target=train, daemon=True)
        training.start()
        wait_until(lambda: space.num_refused >= 5, "changes that find no space")
        assert training.is_alive()
        assert live.coordinator.store.load().get("round", 0) == 0
        assert live.error is None
        space.is_full = False
        training.join()
        assert results == [[3.0, 6.0, 9.0]] * 3
        assert [silo.counted for silo in silos] == [3] * 3
        verify(live.store.root / "audit.jsonl")


def test_disk_full_is_answered_by_507(folder: Path) -> None:
    """Disk full: the status says so."""
    space = Space()
    with live_coordinator(folder, rules(), settings(), before=space) as live:
        silos = silos_at(live)
        openings = in_threads(*(silo.open for silo in silos))
        space.is_full = True
        silos[0].federation.client.gives_up_after = 0
        with pytest.raises(Exception, match=r"status 507.*No space left on device"):
            silos[0].send(openings[0])
        space.is_full = False


def test_an_error_of_the_network_is_not_taken_for_one_of_the_disk(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Connection breaks in the middle of a body: the coordinator goes on, and does not read its folder again."""

    async def read(request: web.Request) -> bytes:
        raise OSError(errno.EHOSTUNREACH, "No route to host")

    with live_coordinator(folder, rules(), settings()) as live:
        client = Client(live.address, Kit(folder / "east"), gives_up_after=0)
        monkeypatch.setattr(web.Request, "read", read)
        with pytest.raises(http.client.HTTPException, match="status 408"):
            client.ask("POST", "/v1/leave", {})
        client.close()


def test_disk_full_in_the_middle_of_a_line_of_the_audit_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Disk full: the chain of the audit log does not break."""
    log = AuditLog(tmp_path / "audit.jsonl")
    log.append("one")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            log.append("two")
    log.append("three")
    assert verify(tmp_path / "audit.jsonl")[0] == 2


@pytest.mark.parametrize("minutes", [-10, 10])
def test_clock_of_the_coordinator_is_off(
    live: LiveCoordinator, minutes: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Clock ahead or behind by 10 minutes: it works, and each silo warns."""
    clock = SimpleNamespace(monotonic=time.monotonic, time=lambda: time.time() + 60 * minutes)
    monkeypatch.setattr(http_server, "time", clock)
    with caplog.at_level(logging.WARNING, "lightning_fl.network"):
        silos = silos_at(live)
    warned = [record.getMessage() for record in caplog.records if "clocks of this machine" in record.getMessage()]
    assert len(warned) == 3
    assert f"differ by {60 * minutes} s" in warned[0].replace("599", "600")
    assert models_of(silos) == [[3.0, 6.0, 9.0]] * 3


def test_clock_of_a_silo_is_behind_a_new_certificate(folder: Path) -> None:
    """Clock behind by 10 minutes: a certificate that was just made is valid already."""
    decoded = ssl._ssl._test_decode_cert(str(folder / "east" / "cert.pem"))  # type: ignore[attr-defined]
    assert ssl.cert_time_to_seconds(decoded["notBefore"]) < time.time() - 600


def test_clock_set_back_between_restarts_renews_the_deadline_and_no_more(folder: Path) -> None:
    """Clock set back: a round that seems to open in the future gets its deadline, not more."""
    store = Store(folder / "federation")
    store.write_cohort(0, {"east"})
    assert store.read_cohort(0) is not None
    Disk().write_json(store.folder(0) / "cohort.json", {"silos": ["east"], "opened": time.time() + 1e6})
    assert store.read_cohort(0) == ({"east"}, 0.0)
    store.close()


@pytest.mark.slow
def test_coordinator_that_restarts_again_and_again_closes_its_round(folder: Path) -> None:
    """Cut-off set, waits for the dead anyway: restarts do not put off ``max_deadline_s``."""
    with live_coordinator(folder, rules(), settings()) as live:
        silos = silos_at(live)
        openings = in_threads(*(silo.open for silo in silos))
        east = threading.Thread(target=lambda: silos[0].send(openings[0]), daemon=True)
        east.start()
        live.wait_for("update accepted")
        live.restart()
        assert live.coordinator.machine.phase == "training"  # younger than its longest time: it waits for the dead
        live.stop()
        cohort = live.folder / "federation" / "rounds" / "000000" / "cohort.json"
        opened = time.time() - live.rules.max_deadline_s - 1.0
        Disk().write_json(cohort, {"silos": sorted(NAMES), "opened": opened})
        live.start()
        east.join()
        assert live.events("round closed")[0]["lost"] == ["north", "south"]


@pytest.mark.slow
def test_each_response_is_dropped_once(live: LiveCoordinator, monkeypatch: pytest.MonkeyPatch) -> None:
    """A retry of a call that had worked: done twice. The answer to each call is lost once: the same bits come out."""
    original, lost, lock = Client._try, set(), threading.Lock()

    def lossy(self: Client, method: str, path: str, *rest: Any) -> Any:
        refused = answer = None
        try:
            answer = original(self, method, path, *rest)
        except CallRefused as error:
            refused = error
        call = self.kit.name, method, path
        with lock:
            is_first = call not in lost
            lost.add(call)
        if is_first:
            raise ConnectionResetError("the answer is lost")
        if refused is not None:
            raise refused
        return answer

    monkeypatch.setattr(Client, "_try", lossy)
    silos = silos_at(live)
    models = models_of(silos)
    monkeypatch.undo()
    assert models == [[3.0, 6.0, 9.0]] * 3
    assert [silo.counted for silo in silos] == [3] * 3
    assert {(method, path.split("/")[2].split("?")[0]) for _, method, path in lost} >= {
        ("POST", "join"),
        ("PUT", "start"),
        ("GET", "states"),
        ("GET", "rounds"),
        ("HEAD", "rounds"),
        ("PUT", "rounds"),
        ("POST", "leave"),
    }
    assert [event["round"] for event in live.events("round closed")] == [0, 1, 2]
    assert live.coordinator.progress.global_step == 9  # three silos, three rounds, one step each


def test_200_half_open_sockets(live: LiveCoordinator) -> None:
    """Dead peer holds a thread for 2 h: a new silo joins although 200 connections say nothing."""
    context = identity.client_context(Kit(live.folder / "east"))
    dead: list[socket.socket] = []
    try:
        for number in range(200):
            plain = socket.create_connection((HOST, live.port))
            if number % 10 == 0:  # some have introduced themselves, and die in the middle of a call
                plain = context.wrap_socket(plain, server_hostname=HOST)
                plain.sendall(b"POST /v1/alive HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
            dead.append(plain)
        assert models_of(silos_at(live)) == [[3.0, 6.0, 9.0]] * 3
    finally:
        for plain in dead:
            plain.close()


@pytest.mark.parametrize(
    ("host", "addresses"),
    [("::1", ["[::1]"]), ("127.0.0.1", ["127.0.0.1"]), (None, ["[::1]", "127.0.0.1", HOST])],
    ids=["IPv6 only", "IPv4 only", "dual stack"],
)
def test_ip_versions(folder: Path, host: str | None, addresses: list[str]) -> None:
    """IPv6 only / IPv4 only: each alone, and both."""
    with socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True) as free:
        port = free.getsockname()[1]
    with live_coordinator(folder, rules(rounds=1), settings(), host=host, port=port) as live:
        silos = [
            TinySilo(folder, f"https://{addresses[index % len(addresses)]}:{port}", name, step).join()
            for index, (name, step) in enumerate(STEPS.items())
        ]
        assert models_of(silos) == [[3.0]] * 3
        assert live.events("round closed")[0]["lost"] == []


def test_silos_behind_one_address(live: LiveCoordinator) -> None:
    """Identity by peer address: silos behind one NAT are told apart, and one that leaves does not end the others."""
    with Relay(live.port) as relay:
        east, north, south = silos_at(live, relay.address)
        assert in_threads(east.round, north.round, south.round) == [3.0] * 3
        south.federation.leave("done")
        assert in_threads(east.round, north.round) == [4.5] * 2
    assert live.events("round closed")[0]["members"].keys() == set(NAMES)


def test_socket_cut_in_training(live: LiveCoordinator) -> None:
    """Long training, then the result can't be sent; idle sockets cut: the update arrives over another connection."""
    with Relay(live.port) as relay:
        silos = silos_at(live, relay.address)
        openings = in_threads(*(silo.open for silo in silos))
        assert relay.cut() >= 3
        sent = in_threads(*(lambda s=s, o=o: s.send(o) for s, o in zip(silos, openings, strict=True)))
        assert sent == [3.0] * 3
        assert [silo.counted for silo in silos] == [1] * 3


MEGABYTE = 250_000
"""Elements of a model of one megabyte."""


@pytest.mark.parametrize("megabytes", [1, pytest.param(40, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_a_slow_link_holds_the_round_while_it_sends(folder: Path, megabytes: int) -> None:
    """Transfer starves heartbeats; a slow link times out: the deadline is put off while bytes come, all are counted."""
    with live_coordinator(folder, rules(deadline_s=0.2, rounds=2), settings()) as live:
        with Relay(live.port, rate=2e6 * megabytes) as link:
            silos = [TinySilo(folder, link.address, name, size=megabytes * MEGABYTE).join() for name in NAMES]
            assert in_threads(*(silo.round for silo in silos)) == [1.0] * 3
        assert [event["lost"] for event in live.events("round closed")] == [[]]


@pytest.mark.slow
def test_a_link_that_is_too_slow_delays_nobody_beyond_the_limit(folder: Path) -> None:
    """One slow and five fast: the round closes without the slow one, the next one runs, and nobody meets an error."""
    names = (*NAMES, "west", "centre", "slow")
    make_kits(folder, names[3:])
    limits = {"deadline_s": 0.5, "max_deadline_s": 2.0, "min_silos": 5}
    with live_coordinator(folder, rules(silos=names, **limits), settings()) as live, Relay(live.port) as link:
        addresses = [live.address] * 5 + [link.address]
        silos = [
            TinySilo(folder, where, name, size=MEGABYTE).join() for where, name in zip(addresses, names, strict=True)
        ]
        openings = in_threads(*(silo.open for silo in silos))
        link.rate = 2e4  # 50 seconds for its update
        fast, slow, late = silos[:5], silos[5], []
        sending = threading.Thread(target=lambda: late.append(slow.send(openings[5])), daemon=True)
        sending.start()
        wait_until(lambda: "slow" in live.coordinator.machine.sending, "the first bytes")
        sends = [lambda silo=silo, own=own: silo.send(own) for silo, own in zip(fast, openings, strict=False)]
        assert in_threads(*sends) == [1.0] * 5
        assert in_threads(*(silo.round for silo in fast)) == [2.0] * 5
        assert [event["lost"] for event in live.events("round closed")] == [["slow"], []]
        link.rate = None
        sending.join(PATIENCE)
        assert late == [2.0]


def test_there_are_four_times_to_set() -> None:
    """Over 100 timeout settings: the times that `federation.yaml` has."""
    times = [field.name for field in fields(Rules) if field.name.endswith("_s")]
    assert times == ["gather_s", "deadline_s", "max_deadline_s", "evaluation_s"]


def run_benchmark(megabytes: int, silos: int, *words: str) -> str:
    """The line that ``benchmarks/network.py`` prints of two rounds."""
    options = ["--megabytes", str(megabytes), "--silos", str(silos), "--rounds", "2", "--port", "28643", *words]
    script = str(REPOSITORY / "benchmarks" / "network.py")
    done = run_script(["python", script, *options], num_processes=silos + 1, timeout=5 * PATIENCE)
    return str(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_memory_does_not_grow_with_the_silos() -> None:
    """Memory of (clients + 2) models: the coordinator holds one and a half, and 200 MB, beside what it starts with."""
    assert_memory_is_bounded(run_benchmark(25, 20))


def assert_memory_is_bounded(line: str) -> None:
    peak, bound = re.findall(r"(\d+) MB \(bound (\d+)\)", line)[0]
    assert int(peak) <= int(bound), line


@pytest.mark.slow
@pytest.mark.timeout(6 * PATIENCE)
def test_a_big_model_goes_round() -> None:
    """Big model freezes: 2 GB go up and down with the default settings, and the memory stays within its bound."""
    line = run_benchmark(2000, 1)
    assert "| 2000 MB x 1 |" in line
    assert_memory_is_bounded(line)


@pytest.mark.slow
def test_a_round_is_closed_at_its_deadline_to_the_second(folder: Path) -> None:
    """Cut-off set, waits for the dead anyway: with one silo dead the round takes its deadline, and a second at most."""
    with live_coordinator(folder, rules(deadline_s=3.0), settings()) as live:
        silos = silos_at(live)
        openings = in_threads(*(silo.open for silo in silos))
        in_threads(*(lambda s=s, o=o: s.send(o) for s, o in zip(silos[:2], openings, strict=False)))
        (opened,), (closed,) = live.events("round opened"), live.events("round closed")
    assert closed["lost"] == ["south"]
    times = [datetime.fromisoformat(event["time"]) for event in (opened, closed)]
    assert (times[1] - times[0]).total_seconds() == pytest.approx(3.0, abs=1.0)


@pytest.mark.slow
def test_twenty_starts_of_a_silo(folder: Path) -> None:
    """Stopped node can't reconnect: stopped or killed after each round, it is in the next."""
    with live_coordinator(folder, rules(rounds=20), settings()) as live:
        east, north, south = silos_at(live)
        for round in range(20):
            assert in_threads(east.round, north.round, south.round) == [3.0 * (round + 1)] * 3
            if round % 2:
                south.federation.leave("stopped")
            south = TinySilo(folder, live.address, "south", STEPS["south"]).join()
        assert [len(event["members"]) for event in live.events("round closed")] == [3] * 20
        assert south.counted == 20


def test_what_came_of_another_update_is_not_used(live: LiveCoordinator) -> None:
    """A silo dies in sending: only the same bytes go on where they stopped; a new update starts over."""
    east, north, south = silos_at(live)
    openings = in_threads(east.open, north.open, south.open)
    path = f"/v1/rounds/0/update/{'0' * 64}"
    headers = {"Upload-Offset": "0", "Upload-Length": "5000"}
    status, _, _ = south.federation.client.call("PUT", path, lambda: b"x" * 1000, headers)
    assert status == 200
    parts = live.store.folder(0, "update")
    assert [path.stat().st_size for path in parts.glob("south.*.part")] == [1000]
    again = TinySilo(live.folder, live.address, "south", 6.0).join()  # the process that comes after it
    sent = in_threads(*(lambda s=s, o=o: s.send(o) for s, o in zip((east, north), openings, strict=False)), again.round)
    assert sent == [3.0] * 3
    assert list(parts.glob("*.part")) == []


@pytest.mark.parametrize("phase", ["gathering", "training", "closed"])
@pytest.mark.spread(1)
def test_stop_of_a_silo(live: LiveCoordinator, phase: str) -> None:
    """Shutdown in mid-round, of a silo: nobody waits for it, and what it has sent counts."""
    east, north, south = silos_at(live)
    if phase == "gathering":
        south.federation.leave("stopped")
        assert in_threads(east.round, north.round) == [1.5] * 2
    elif phase == "training":
        openings = in_threads(east.open, north.open, south.open)
        south.federation.leave("stopped")
        assert in_threads(lambda: east.send(openings[0]), lambda: north.send(openings[1])) == [1.5] * 2
    else:
        assert in_threads(east.round, north.round, south.round) == [3.0] * 3
        south.federation.leave("stopped")
    again = TinySilo(live.folder, live.address, "south", 6.0).join()
    first = 3.0 if phase == "closed" else 1.5
    assert in_threads(east.round, north.round, again.round) == [first + 3.0] * 3


def test_when_all_silos_have_left_the_run_waits_for_the_first_that_comes_back(live: LiveCoordinator) -> None:
    """A silo wants to stop: it leaves, and when all do, nothing is lost."""
    silos = silos_at(live)
    assert in_threads(*(silo.round for silo in silos)) == [3.0] * 3
    for silo in silos:
        silo.federation.leave("enough")
    again = silos_at(live)
    assert models_of(again) == [[6.0, 9.0]] * 3
    assert len(live.events("leave")) == 6


@pytest.mark.slow
def test_connection_that_falls_silent_in_the_middle_of_an_update(live: LiveCoordinator) -> None:
    """Partition, half-open socket: the silo dials again, the new connection takes over, the transfer goes on."""
    size = 1 << 20  # 4 MiB
    with Relay(live.port) as relay:
        ways = {"east": relay.address, "north": live.address, "south": live.address}
        silos = [TinySilo(live.folder, ways[name], name, step, size).join() for name, step in STEPS.items()]
        openings = in_threads(*(silo.open for silo in silos))
        connection = silos[0].federation.client._connection
        assert connection is not None
        connection.sock.settimeout(1.0)  # as after a minute
        relay.fall_silent(after=3 << 20)
        relay.num_bytes = 0
        sent = in_threads(*(lambda s=s, o=o: s.send(o) for s, o in zip(silos, openings, strict=True)))
        assert sent == [3.0] * 3
        # What had come was not sent again; the new model, of 4 MiB, came back.
        assert 8 << 20 < relay.num_bytes < 10 << 20


def test_sigterm_of_the_coordinator_while_it_adds_up(folder: Path) -> None:
    """Shutdown in mid-round, in the phase of closing: the old round or the new one, and each update counts once."""
    closing, stopped = threading.Event(), threading.Event()

    def before(operation: str) -> None:
        if operation == "write outcome" and not stopped.is_set():
            closing.set()
            stopped.wait(60)

    with live_coordinator(folder, rules(), settings(), before=before) as live:
        silos = silos_at(live)
        results: list[Any] = []
        training = threading.Thread(target=lambda: results.extend(models_of(silos)), daemon=True)
        training.start()
        assert closing.wait(60)
        assert live.coordinator.machine.phase == "closing"
        live._loop.call_soon_threadsafe(live._task.cancel)
        stopped.set()
        live.restart()
        training.join()
        assert results == [[3.0, 6.0, 9.0]] * 3
        assert live.coordinator.progress.global_step == 9


@pytest.mark.slow
def test_sigterm_of_the_coordinator_while_evaluations_come_in(live: LiveCoordinator) -> None:
    """Shutdown in the exchange after a round: what had come is kept, and all get the same answer."""
    east, north, south = silos_at(live)
    assert in_threads(east.round, north.round, south.round) == [3.0] * 3
    asked = [
        threading.Thread(target=lambda s=silo: results.update({s.name: gather(s)}), daemon=True)  # type: ignore[misc]
        for silo in (east, north, south)
    ]
    results: dict[str, Any] = {}

    def gather(silo: TinySilo) -> list[str]:
        metrics = {silo.name: {**ENTRY, "name": silo.name}}
        found = silo.federation.gather(Message({**EVALUATION, "metrics": metrics}), "evaluation")
        return [name for message in found for name in message.fields["metrics"]]

    asked[0].start()
    wait_until(lambda: any(exchange.done for exchange in live.coordinator.exchanges.values()), "the first evaluation")
    live.restart()
    for thread in asked[1:]:
        thread.start()
    for thread in asked:
        thread.join()
    assert results == dict.fromkeys(NAMES, sorted(NAMES))


def test_sigterm_of_the_coordinator_between_rounds_and_at_the_end(live: LiveCoordinator) -> None:
    """Shutdown between two rounds and after the last: the run goes on, and stays over."""
    silos = silos_at(live)
    for expected in (3.0, 6.0, 9.0):
        assert in_threads(*(silo.round for silo in silos)) == [expected] * 3
        live.restart()
    assert live.coordinator.machine.phase == "over"
    assert in_threads(*(silo.open for silo in silos)) == [None] * 3


def test_renewal_of_certificates_in_mid_round(live: LiveCoordinator) -> None:
    """Certificates not reloadable: both sides' certificates are renewed in an open round, and the round goes on."""
    silos = silos_at(live)
    openings = in_threads(*(silo.open for silo in silos))
    authority = Authority(live.folder / "ca")
    for name in NAMES:
        kit = live.folder / name
        before = (kit / "cert.pem").read_bytes()
        _, _, issued = authority.approve(make_request(kit, name))
        shutil.copy(issued / "cert.pem", kit / "cert.pem")
        assert (kit / "cert.pem").read_bytes() != before
    own = live.folder / "ca" / "coordinator"
    (own / "cert.pem").write_bytes((own / "cert.pem").read_bytes() + b"\n")  # written again, as renewing does
    live.wait_for("kit read again")
    for silo in silos[:2]:  # two dial again, one stays on its connection
        silo.federation.client.close()
    sent = in_threads(*(lambda s=s, o=o: s.send(o) for s, o in zip(silos, openings, strict=True)))
    assert sent == [3.0] * 3
    assert live.events("refused", "connection refused") == []


def test_provisioning_twice_changes_nothing(live: LiveCoordinator) -> None:
    """New CA at every build: creating the authority and the requests again leaves every file as it is."""
    files = [path for path in live.folder.rglob("*.pem") if "issued" not in path.parts]
    before = {path: path.read_bytes() for path in files}
    Authority.create(live.folder / "ca", "demo", [HOST, "127.0.0.1", "::1"])
    for name in NAMES:
        make_request(live.folder / name, name)
    assert {path: path.read_bytes() for path in files} == before
    assert models_of(silos_at(live)) == [[3.0, 6.0, 9.0]] * 3


def test_a_proxy_that_passes_only_connect(live: LiveCoordinator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Old network gear passes only HTTP(S): all goes through CONNECT, with the password that HTTPS_PROXY has."""
    with ConnectProxy("silo:se%cret") as proxy:
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.setenv("HTTPS_PROXY", proxy.address.replace("se%cret", "se%25cret"))
        silos = silos_at(live)
        assert models_of(silos) == [[3.0, 6.0, 9.0]] * 3
        assert set(proxy.asked) == {f"CONNECT {HOST}:{live.port}"}
        assert proxy.num_bytes > 10_000
        monkeypatch.setenv("HTTPS_PROXY", proxy.address.replace("se%cret", "wrong"))
        with pytest.raises(OSError, match="407"):
            Client(live.address, Kit(live.folder / "east"), gives_up_after=0).ask("GET", "/v1/check")


@pytest.mark.slow
def test_all_failures_through_a_proxy() -> None:
    """The tests of what happens when something dies, with a CONNECT proxy in between."""
    with ConnectProxy() as proxy:
        words = ["python", "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/coordinator/test_failures.py"]
        environment = {**os.environ, "HTTPS_PROXY": proxy.address, "NO_PROXY": ""}
        words[0] = sys.executable
        done = subprocess.run(words, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-3000:]
        assert len(proxy.asked) > 50


@pytest.mark.slow
@pytest.mark.skipif(not glob.glob("/usr/lib/*/faketime/libfaketime.so.1"), reason="needs libfaketime")
@pytest.mark.parametrize("minutes", [-10, 10])
def test_a_silo_whose_clock_is_wrong(live: LiveCoordinator, minutes: int) -> None:
    """Clock ahead, all refused elsewhere: ten minutes either way train, and the silo is told."""
    code = (
        "import logging, sys; from pathlib import Path; from tests.helpers.network import TinySilo\n"
        "logging.basicConfig(level=logging.WARNING)\n"
        "print(TinySilo(Path(sys.argv[1]), sys.argv[2], 'south', 6.0).join().run())"
    )
    (library,) = glob.glob("/usr/lib/*/faketime/libfaketime.so.1")
    # Without the monotonic clock: with it, Python's locks wait for a time that never comes.
    environment = {
        **os.environ,
        "LD_PRELOAD": library,
        "FAKETIME": f"{minutes * 60:+d}",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "PYTHONPATH": str(REPOSITORY),
    }
    words = [sys.executable, "-c", code, str(live.folder), live.address]
    with subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        east, north = (TinySilo(live.folder, live.address, name, STEPS[name]).join() for name in ("east", "north"))
        assert [list(models) for models in in_threads(east.run, north.run)] == [[3.0, 6.0, 9.0]] * 2
        printed, told = process.communicate(timeout=PATIENCE)
    assert "[3.0, 6.0, 9.0]" in printed
    assert f"differ by {-minutes * 60} s" in told
