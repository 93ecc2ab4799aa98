"""The commands of a federation over a network, and what they say when something is wrong."""

from __future__ import annotations

import contextlib
import http.server
import re
import shutil
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lightning_fl.cli import main
from lightning_fl.cli.coordinator import read_strategy
from lightning_fl.coordinator import diagnosis
from lightning_fl.coordinator.client import connect
from lightning_fl.coordinator.config import read_config
from lightning_fl.coordinator.diagnosis import diagnose
from lightning_fl.coordinator.identity import Authority, Kit, hosts_of, server_context
from tests.helpers.distributed import PATIENCE
from tests.helpers.network import (
    ConnectProxy,
    LiveCoordinator,
    TinySilo,
    in_threads,
    live_coordinator,
    make_kit,
    make_kits,
    rules,
    settings,
)


@pytest.fixture
def live(tmp_path: Path) -> Iterator[LiveCoordinator]:
    make_kits(tmp_path)
    with live_coordinator(tmp_path, rules(rounds=1), settings()) as own:
        yield own


def test_from_nothing_to_a_kit_and_twice_changes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """New CA at every build: ``ca init`` and ``request`` given again change no key, certificate or list."""
    main(["network", "ca", "init", "hospitals", "--name", "demo", "--host", "fl.example.org"])
    main(["network", "request", "north", "--out", "kit"])
    files = [path for path in Path().rglob("*") if path.suffix in (".pem", ".key", ".json")]
    assert {str(path) for path in files} >= {"hospitals/ca.key", "hospitals/coordinator/crl.pem", "kit/key.pem"}
    before = {path: path.read_bytes() for path in files}
    main(["network", "ca", "init", "hospitals", "--name", "demo", "--host", "fl.example.org"])
    main(["network", "request", "north", "--out", "kit"])
    assert {path: path.read_bytes() for path in files} == before
    main(["network", "approve", "hospitals", "kit/request.csr"])
    printed = capsys.readouterr().out
    fingerprints = {word for word in printed.split() if word.count(":") == 15}
    assert len(fingerprints) == 1  # what the silo has printed is what the authority shows
    for name in ("cert.pem", "ca.pem"):
        shutil.copy(f"hospitals/issued/north/{name}", "kit")
    assert (Kit("kit").name, Kit("kit").federation) == ("north", "demo")
    main(["network", "renew", "kit"])
    main(["network", "approve", "hospitals", "kit/request.csr"])
    main(["network", "revoke", "hospitals", "north"])
    assert "Revoked 2 certificates" in capsys.readouterr().out


def test_the_authority_made_again_for_another_host_gives_the_coordinator_a_certificate_for_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    init = ["network", "ca", "init", "hospitals", "--name", "demo"]
    main([*init, "--host", "fl.example.org"])
    kit, key = Kit("hospitals/coordinator"), Path("hospitals/coordinator/key.pem").read_bytes()
    assert "is new" not in capsys.readouterr().out
    main([*init, "--host", "10.0.0.7", "--host", "fl.example.org"])
    assert "is new and valid for 10.0.0.7, fl.example.org" in capsys.readouterr().out
    assert {str(name.value) for name in hosts_of(kit.check())} == {"10.0.0.7", "fl.example.org"}
    assert kit.key.read_bytes() == key
    before = kit.cert.read_bytes()
    main([*init, "--host", "fl.example.org", "--host", "10.0.0.7"])
    assert kit.cert.read_bytes() == before


@pytest.mark.parametrize("words", [["request", "Not a name", "--out", "kit"], ["approve", "nowhere", "x.csr"]])
def test_mistakes_end_in_one_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["network", *words])
    assert capsys.readouterr().err.count("\n") == 1


def test_the_check_of_a_way_that_works(live: LiveCoordinator) -> None:
    lines = list(diagnose(live.address, live.folder / "east"))
    assert [line.partition(":")[0] for line in lines] == ["kit", "name", "TLS 1.3", "coordinator", "clock"]


def failure(address: str, kit: Path) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        list(diagnose(address, kit))
    return str(caught.value)


def test_the_check_names_the_fault(live: LiveCoordinator, tmp_path: Path) -> None:
    kit = live.folder / "east"
    assert "is not known here" in failure("https://no-such-name.invalid:1", kit)
    assert "is not an address" in failure("http://localhost:1", kit)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        assert "Nothing listens" in failure(f"https://localhost:{unused.getsockname()[1]}", kit)
    plain = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    thread = threading.Thread(target=plain.serve_forever, daemon=True)
    thread.start()
    assert "does not speak TLS" in failure(f"https://localhost:{plain.server_port}", kit)
    plain.shutdown()
    plain.server_close()
    thread.join()
    # Something in between shows a certificate of its own, as an inspecting proxy does.
    shutil.copytree(kit, tmp_path / "other")
    other = Authority.create(tmp_path / "elsewhere", "demo", ["localhost"])
    shutil.copy(other.folder / "ca.pem", tmp_path / "other" / "ca.pem")
    assert "not of this federation's authority" in failure(live.address, tmp_path / "other")
    Authority(live.folder / "ca").revoke("east")
    live.wait_for("kit read again")
    assert "revoked" in failure(live.address, kit) or "closes the connection" in failure(live.address, kit)


@contextmanager
def answers(context: ssl.SSLContext, reply: bytes = b"") -> Iterator[int]:
    """The port of something else that stands where the coordinator should."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with contextlib.suppress(OSError):
                near, _ = listener.accept()
                with context.wrap_socket(near, server_side=True) as connection:
                    connection.recv(1 << 16)
                    connection.sendall(reply)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listener.getsockname()[1]
        thread.join(PATIENCE)


def test_the_check_names_what_is_wrong_with_certificates_and_balancers(tmp_path: Path) -> None:
    authority = make_kits(tmp_path)
    kit, own = tmp_path / "east", Kit(tmp_path / "ca" / "coordinator")
    authority.renew_coordinator(["elsewhere.example.org"])
    with answers(server_context(own)) as port:
        assert "for another name" in failure(f"https://localhost:{port}", kit)
    authority.renew_coordinator(["localhost"])
    # A balancer with the right certificate that answers for the coordinator.
    with answers(server_context(own), b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}") as port:
        assert "but is not a coordinator. Is a load balancer" in failure(f"https://localhost:{port}", kit)
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    old.load_cert_chain(own.cert, own.key)
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with answers(old) as port:
        assert "does not speak TLS 1.3" in failure(f"https://localhost:{port}", kit)
    make_kit(authority, tmp_path / "north", "north", days=0)
    time.sleep(1.1)  # certificates know seconds
    assert "has ended. Run: lightning-fl network renew" in failure("https://localhost:1", tmp_path / "north")


def test_the_check_names_what_a_clock_does(live: LiveCoordinator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "time", SimpleNamespace(time=lambda: time.time() + 600))
    told = next(line for line in diagnose(live.address, live.folder / "east") if line.startswith("clock"))
    assert re.match(r"clock: WARNING, \+(599|600|601) s off", told)
    own = Kit(live.folder / "ca" / "coordinator")
    names = ["spiffe://demo/coordinator"]
    authority = Authority(live.folder / "ca")
    authority._issue(own.folder / "request.csr", own.folder, names, ["localhost"], is_server=True, days=0)
    time.sleep(1.1)  # certificates know seconds
    with answers(server_context(own)) as port:
        assert "Is the clock of this machine right?" in failure(f"https://localhost:{port}", live.folder / "east")


def test_the_check_names_a_proxy_that_lets_nothing_through(
    live: LiveCoordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    with ConnectProxy("silo:secret") as proxy:
        monkeypatch.setenv("HTTPS_PROXY", proxy.address.replace("secret", "wrong"))
        assert "The proxy does not let this silo through" in failure(live.address, live.folder / "east")
    monkeypatch.setenv("HTTPS_PROXY", "http://no-such-proxy.invalid:3128")
    assert "The proxy's name is not known here" in failure(live.address, live.folder / "east")


def test_the_check_names_a_firewall(live: LiveCoordinator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "connect", partial(connect_within, 0.2))
    with socket.create_server(("127.0.0.1", 0), backlog=0) as silent:
        assert "a firewall drops it" in failure(f"https://localhost:{silent.getsockname()[1]}", live.folder / "east")


def connect_within(seconds: float, *args: Any, timeout: float) -> Any:
    return connect(*args, timeout=seconds)


def test_the_check_warns_once_half_of_the_time_is_over(live: LiveCoordinator, monkeypatch: pytest.MonkeyPatch) -> None:
    kit = live.folder / "east"
    assert "renew it soon" not in next(diagnose(live.address, kit))

    class Later(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime.now(tz) + timedelta(days=46)

    monkeypatch.setattr(diagnosis, "datetime", Later)
    assert "good for 43 days; renew it soon: lightning-fl network renew" in next(diagnose(live.address, kit))


def test_the_model_is_exported_as_a_checkpoint(live: LiveCoordinator, capsys: pytest.CaptureFixture[str]) -> None:
    silos = [TinySilo(live.folder, live.address, name, 2.0).join() for name in ("east", "north", "south")]
    in_threads(*(silo.run for silo in silos))
    main(["network", "export", str(live.store.root), "model.ckpt"])
    checkpoint = torch.load("model.ckpt", weights_only=True)
    assert torch.equal(checkpoint["state_dict"]["x"], torch.full((3,), 2.0))
    assert (checkpoint["epoch"], checkpoint["global_step"]) == (1, 3)
    main(["network", "audit", "verify", str(live.store.root / "audit.jsonl")])
    assert "each follows from the one before" in capsys.readouterr().out


def test_the_coordinator_reads_the_strategy_and_runs_no_code_of_others(tmp_path: Path) -> None:
    path = tmp_path / "train.yaml"
    path.write_text("trainer: {strategy: fedadam}\nmodel: {class_path: nobody.Knows}")
    assert type(read_strategy(path).algorithm).__name__ == "FedAdam"
    path.write_text(
        "trainer: {strategy: {class_path: FederatedStrategy, init_args: {algorithm: {class_path: os.system}}}}"
    )
    with pytest.raises(ValueError, match="runs only code of lightning_fl"):
        read_strategy(path)
    path.write_text("model: 1")
    with pytest.raises(ValueError, match=r"has no trainer\.strategy"):
        read_strategy(path)


GOOD = "silos: [a, b]\nrounds: 3\nkit: kit\nfolder: fed\n"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (GOOD + "round: 4", "unknown entries 'round'"),
        (GOOD.replace("rounds: 3\n", ""), "lacks rounds"),
        (GOOD.replace("3", "many"), "expected a number"),
        (GOOD.replace("[a, b]", "a"), "expected a list"),
        (GOOD.replace("[a, b]", "[a, ../b]"), "lower-case letters"),
        (GOOD + "min_silos: 3", "min_silos=3"),
        ("[]", "holds no mapping"),
    ],
)
def test_mistakes_in_federation_yaml_are_named(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "federation.yaml"
    path.write_text(GOOD)
    assert read_config(path).rules.silos == ("a", "b")
    path.write_text(text)
    with pytest.raises(ValueError, match=reason):
        read_config(path)
