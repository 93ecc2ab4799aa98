"""Nobody else gets in: every attempt is refused and written down."""

from __future__ import annotations

import http.client
import json
import shutil
import socket
import ssl
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_fl.coordinator import identity, wire
from lightning_fl.coordinator.client import CallRefused, Client, NotAdmitted
from lightning_fl.coordinator.identity import Authority, Kit, make_request
from lightning_fl.federation import RankReport
from lightning_fl.tree import flatten
from tests.helpers.network import (
    HOST,
    LiveCoordinator,
    TinySilo,
    in_threads,
    make_kit,
    make_kits,
    wait_until,
)


def try_to_call(live: LiveCoordinator, context: ssl.SSLContext) -> int:
    """The status of a call, or 0 if the connection is refused."""
    connection = http.client.HTTPSConnection(HOST, live.port, context=context, timeout=20)
    try:
        connection.request("GET", "/v1/check")
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return 0
    finally:
        connection.close()


def was_logged(live: LiveCoordinator, kind: str, *words: str) -> None:
    def found() -> bool:
        return any(word in event["reason"] for event in live.events(kind) for word in words)

    wait_until(found, f"{kind}: {words} in {live.events()}")


def test_a_silo_of_the_federation_gets_in(live: LiveCoordinator) -> None:
    assert try_to_call(live, identity.client_context(Kit(live.folder / "east"))) == 200
    assert not live.events("refused", "connection refused")


def test_no_certificate(live: LiveCoordinator) -> None:
    context = ssl.create_default_context(cafile=str(live.folder / "east" / "ca.pem"))
    assert [try_to_call(live, context) for _ in range(3)] == [0] * 3
    was_logged(live, "connection refused", "PEER_DID_NOT_RETURN_A_CERTIFICATE")
    assert len(live.events("connection refused")) == 1, "strangers can't fill the disk with lines of the log"


def test_a_certificate_of_another_authority(live: LiveCoordinator, tmp_path: Path) -> None:
    other = Authority.create(tmp_path / "other", "demo", [HOST])
    kit = make_kit(other, tmp_path / "mallory", "east")
    shutil.copy(live.folder / "east" / "ca.pem", kit.ca)
    assert try_to_call(live, identity.client_context(kit)) == 0
    was_logged(live, "connection refused", "unable to get local issuer", "certificate signature failure", "self-signed")


def test_an_expired_certificate(live: LiveCoordinator, tmp_path: Path) -> None:
    kit = make_kit(Authority(live.folder / "ca"), tmp_path / "expired", "east", days=0)
    wait_until(lambda: try_to_call(live, identity.client_context(kit)) == 0, "the certificate expires")
    was_logged(live, "connection refused", "certificate has expired")


def test_a_certificate_that_is_revoked_while_its_connection_is_open(live: LiveCoordinator) -> None:
    kit = Kit(live.folder / "east")
    client = Client(live.address, kit)
    assert client.ask("POST", "/v1/alive", {}) == {"round": 0}
    Authority(live.folder / "ca").revoke("east")
    live.wait_for("kit read again")
    with pytest.raises(CallRefused, match="its certificate was revoked"):
        client.ask("POST", "/v1/alive", {})
    client.close()
    was_logged(live, "refused", "revoked")
    # Anew, TLS refuses it, of which asyncio tells the other side nothing in Python 3.11: the audit log has the reason.
    client.gives_up_after = 0
    with pytest.raises((CallRefused, NotAdmitted, OSError, http.client.HTTPException)):
        client.ask("POST", "/v1/alive", {})
    client.close()
    north = Client(live.address, Kit(live.folder / "north"))
    assert north.ask("POST", "/v1/alive", {}) == {"round": 0}
    north.close()


def test_a_name_that_is_not_of_the_federation(live: LiveCoordinator, tmp_path: Path) -> None:
    kit = make_kit(Authority(live.folder / "ca"), tmp_path / "mallory", "mallory")
    assert try_to_call(live, identity.client_context(kit)) == 403
    was_logged(live, "refused", "'mallory' is not among the silos")


def test_a_certificate_for_another_federation_of_the_same_authority(live: LiveCoordinator, tmp_path: Path) -> None:
    authority = Authority(live.folder / "ca")
    kit = Kit(tmp_path / "else")
    request = make_request(kit.folder, "east")
    authority._issue(request, kit.folder, ["spiffe://elsewhere/silo/east"], (), is_server=False)
    assert try_to_call(live, identity.client_context(kit)) == 403
    was_logged(live, "refused", "for the federation 'elsewhere'")


def test_the_servers_certificate_as_a_client(live: LiveCoordinator) -> None:
    assert try_to_call(live, identity.client_context(Kit(live.folder / "ca" / "coordinator"))) == 0
    was_logged(live, "connection refused", "purpose")


def test_plain_http(live: LiveCoordinator) -> None:
    with socket.create_connection((HOST, live.port), timeout=20) as plain:
        plain.sendall(b"GET /v1/rounds?after=-1 HTTP/1.1\r\nHost: x\r\n\r\n")
        answer = plain.recv(100)
    assert b"HTTP/1.1 200" not in answer
    was_logged(live, "connection refused", "HTTP_REQUEST")


def test_tls_1_2(live: LiveCoordinator) -> None:
    context = identity.client_context(Kit(live.folder / "east"))
    context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_2
    assert try_to_call(live, context) == 0
    was_logged(live, "connection refused", "UNSUPPORTED_PROTOCOL", "PROTOCOL")


def test_a_false_coordinator_is_not_spoken_to(live: LiveCoordinator, tmp_path: Path) -> None:
    other = Authority.create(tmp_path / "other", "demo", [HOST])
    kit = make_kit(Authority(live.folder / "ca"), tmp_path / "kit", "east")
    shutil.copy(other.folder / "ca.pem", kit.ca)
    with pytest.raises(NotAdmitted, match="its certificate is not accepted"):
        Client(live.address, kit).ask("POST", "/v1/alive", {})


def test_a_silo_speaks_for_itself_only(live: LiveCoordinator) -> None:
    silos = [TinySilo(live.folder, live.address, name).join() for name in ("east", "north", "south")]
    openings = in_threads(*(silo.open for silo in silos))
    east = silos[0].federation
    # What a body says of its sender is not read.
    client = Client(live.address, Kit(live.folder / "east"))
    client.ask("POST", "/v1/leave", {"reason": "x", "silo": "north"})
    assert live.coordinator.machine.left == {"east"}
    tensors = flatten({"delta": {"x": torch.ones(3)}})
    for field in ("refused", "lost", "empty"):
        report = replace(RankReport(), **{field: ["north"]}).to_message().fields
        wire.write(east.folder.update, tensors, {"report": report, "weight": 1.0})
        with pytest.raises(CallRefused, match="its report names 'north'"):
            client.upload(f"/v1/rounds/{openings[0].round}/update", east.folder.update)
    client.close()


def test_a_replayed_update_counts_once_and_an_old_one_not_at_all(live: LiveCoordinator) -> None:
    silos = [TinySilo(live.folder, live.address, name, 1.0) for name in ("east", "north", "south")]
    for silo in silos:
        silo.join()
    east = silos[0]
    openings = in_threads(*(silo.open for silo in silos))
    east.die_after_sending(openings[0])
    client = Client(live.address, Kit(live.folder / "east"))
    client.upload("/v1/rounds/0/update", east.federation.folder.update)  # the same again
    assert in_threads(*(lambda s=s, o=o: s.send(o) for s, o in zip(silos[1:], openings[1:], strict=True))) == [1.0, 1.0]
    for round in (0, 1, 5):
        with pytest.raises(CallRefused) as caught:
            client.upload(f"/v1/rounds/{round}/update", east.federation.folder.update)
        assert caught.value.status == 410
    client.close()


def call(live: LiveCoordinator, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
    context = identity.client_context(Kit(live.folder / "east"))
    connection = http.client.HTTPSConnection(HOST, live.port, context=context, timeout=60)
    try:
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        content = response.read()
        return response.status, json.loads(content) if content.startswith(b"{") else content
    finally:
        connection.close()


DIGEST = "0" * 64


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/states/../state.json"),
        ("GET", "/v1/states/..%2f..%2fstate.json"),
        ("GET", f"/v1/states/{DIGEST}"),
        ("GET", "/v1/rounds/0/..%2f..%2f..%2fetc%2fpasswd"),
        ("GET", "/v1/rounds/-1/update"),
        ("GET", "/v1/rounds/0x1/update"),
        ("GET", "/v1/rounds/99999999999999999999/update"),
        ("GET", "/v1/rounds/0/Update"),
        ("GET", "/v1/rounds?after=nan"),
        ("GET", "/v1/rounds"),
        ("PUT", f"/v1/rounds/0/..%2fupdate/{DIGEST}"),
        ("PUT", "/v1/rounds/0/update/..%2f..%2fstate"),
        ("PUT", f"/v1/rounds/0/start/{DIGEST}"),
        ("PUT", "/v1/start/abc"),
        ("HEAD", "/v1/start/abc"),
        ("DELETE", "/v1/rounds"),
        ("GET", "/"),
        ("GET", "/metrics"),
    ],
)
def test_tricks_with_paths(live: LiveCoordinator, method: str, path: str) -> None:
    def files() -> list[Path]:
        return sorted(path for path in live.store.root.rglob("*") if path.name != "audit.jsonl")

    before = files()
    status, _ = call(live, method, path, b"x" if method == "PUT" else None, Upload_Length="1", Upload_Offset="0")
    assert 400 <= status < 500
    assert files() == before


def test_what_is_too_large_or_no_json_is_refused(live: LiveCoordinator) -> None:
    assert call(live, "POST", "/v1/join", b"{" + b" " * (1 << 25))[0] == 413
    assert call(live, "POST", "/v1/join", b"[" * 100_000)[0] == 400
    assert call(live, "POST", "/v1/join", b"\xff\xfe")[0] == 400
    assert call(live, "POST", "/v1/join", b"3")[0] == 400
    for length in ("0", "-5", "x", str(1 << 45)):
        assert call(live, "PUT", f"/v1/start/{DIGEST}", b"x", Upload_Length=length, Upload_Offset="0")[0] in (400, 413)
    status, answer = call(live, "PUT", f"/v1/start/{DIGEST}", b"x" * 10, Upload_Length="5", Upload_Offset="0")
    assert (status, "more than the 5 bytes" in answer["error"]) == (413, True)
    status, answer = call(live, "PUT", f"/v1/start/{'1' * 64}", b"12345", Upload_Length="5", Upload_Offset="0")
    assert (status, "not those that were announced" in answer["error"]) == (422, True)


def test_the_private_half_of_the_state_is_not_given_away(live: LiveCoordinator) -> None:
    TinySilo(live.folder, live.address, "east").join()
    model = live.coordinator._model
    assert model is not None
    assert call(live, "GET", f"/v1/states/{model.shared}")[0] == 200
    assert call(live, "GET", f"/v1/states/{model.private}")[0] == 404


def test_files_of_a_kit_are_its_owners_alone(tmp_path: Path) -> None:
    make_kits(tmp_path)
    for path in [*(tmp_path / "east").iterdir(), *(tmp_path / "ca").rglob("*")]:
        if path.suffix in (".key", ".csr", ".json") or path.name == "key.pem":
            assert path.stat().st_mode & 0o077 == 0, path
    key = tmp_path / "east" / "key.pem"
    key.chmod(0o644)
    with pytest.raises(ValueError, match="Others can read"):
        Kit(tmp_path / "east").check()
