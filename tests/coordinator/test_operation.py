"""What those who run a federation rely on: the admin port, space, signals, proxies, several authorities, deployment."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography import x509
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_fl import FederatedStrategy
from lightning_fl.cli import main
from lightning_fl.coordinator.client import CallRefused, Client, NotAdmitted
from lightning_fl.coordinator.identity import Authority, Kit, make_request
from lightning_fl.coordinator.store import Store
from lightning_fl.strategies.network import settings_of_silo
from tests.helpers.distributed import PATIENCE, REPOSITORY
from tests.helpers.network import (
    NAMES,
    ConnectProxy,
    LiveCoordinator,
    TinySilo,
    in_threads,
    live_coordinator,
    rules,
    settings,
    wait_until,
)
from tests.helpers.training import Plain, images, trainer

# ---- the admin port


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def read(port: int, path: str) -> str:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://127.0.0.1:{port}{path}", timeout=PATIENCE) as response:
        return str(response.read().decode())


def test_the_admin_port_tells_what_the_coordinator_does(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    port = free_port()
    with live_coordinator(folder, rules(), settings(), admin_port=port) as live:
        assert json.loads(read(port, "/health")) == {"phase": "gathering"}
        east, north, south = (TinySilo(folder, live.address, name).join() for name in NAMES)
        openings = in_threads(east.open, north.open, south.open)
        sending = threading.Thread(target=lambda: in_threads(lambda: east.send(openings[0])), daemon=True)
        sending.start()
        live.wait_for("update accepted")
        status = json.loads(read(port, "/status"))
        assert [status[key] for key in ("round", "rounds", "phase", "sent")] == [0, 3, "training", ["east"]]
        assert status["cohort"] == sorted(NAMES)
        metrics = dict(line.rsplit(" ", 1) for line in read(port, "/metrics").splitlines() if line[0] != "#")
        assert (metrics["lightning_fl_round"], metrics["lightning_fl_updates"]) == ("0", "1")
        assert float(metrics['lightning_fl_silo_silent_seconds{silo="south"}']) >= 0
        main(["network", "status", "--address", f"http://127.0.0.1:{port}", "--once"])
        shown = capsys.readouterr().out
        assert "1 of 3 rounds: training" in shown
        states = {name: next(line for line in shown.splitlines() if name in line) for name in NAMES}
        assert ["sent" in states["east"], "in the round" in states["north"]] == [True, True]
        # From this machine alone.
        with socket.socket() as other:
            assert other.connect_ex(("127.0.0.2", port)) != 0
        in_threads(lambda: north.send(openings[1]), lambda: south.send(openings[2]))
        sending.join(PATIENCE)


# ---- space


def test_a_round_is_not_opened_without_the_space(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Space for an update of each silo and the next state: until it is there silos wait."""
    free = [10]
    monkeypatch.setattr(Store, "free_bytes", lambda self: free[0])
    with live_coordinator(folder, rules(rounds=1), settings()) as live:
        silos = [TinySilo(folder, live.address, name).join() for name in NAMES]
        results: list[Any] = []
        training = threading.Thread(target=lambda: results.extend(in_threads(*(s.round for s in silos))), daemon=True)
        training.start()
        wait_until(lambda: len(live.coordinator.seen) == 3, "all silos")
        wait_until(lambda: "10 are free: it waits" in json.dumps(live.events()), "what the log says")
        assert live.events("round opened") == []
        free[0] = 12 * (len(NAMES) + 2)
        training.join(PATIENCE)
        assert results == [1.0] * 3


# ---- signals


class Sleeps(Plain):
    """Trains until it is told to stop."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        import time

        time.sleep(0.05)
        return super().training_step(batch, batch_idx)


def train_for_ever(address: str, kit: str) -> None:
    strategy = FederatedStrategy("fedavg", federation=address, kit=kit, local_epochs=10_000)
    trainer(strategy, 2).fit(Sleeps(), DataLoader(images(8), 4))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_a_silo_that_is_stopped_says_that_it_leaves(folder: Path, number: int) -> None:
    own = settings_of_silo(FederatedStrategy("fedavg", local_epochs=10_000))
    with live_coordinator(folder, rules(silos=("east",), rounds=2), settings(), own) as live:
        code = f"from {__name__} import train_for_ever; import sys; train_for_ever(*sys.argv[1:])"
        words = [sys.executable, "-c", code, live.address, str(folder / "east")]
        with subprocess.Popen(words, cwd=REPOSITORY, stderr=subprocess.PIPE, text=True) as process:
            live.wait_for("round opened")
            process.send_signal(number)
            live.wait_for("leave")
            assert process.communicate(timeout=PATIENCE)
        assert live.events("leave")[0]["silo"] == "east"


# ---- proxies and authorities


def test_no_proxy_and_lower_case_names_are_heeded(live: LiveCoordinator, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTPS_PROXY", "https_proxy", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    client = Client(live.address, Kit(live.folder / "east"), gives_up_after=0)
    with ConnectProxy() as proxy:
        monkeypatch.setenv("https_proxy", proxy.address)
        client.ask("GET", "/v1/check")
        client.close()
        assert len(proxy.asked) == 1
        monkeypatch.setenv("no_proxy", "localhost")
        client.ask("GET", "/v1/check")
        client.close()
        assert len(proxy.asked) == 1


def test_a_kit_may_name_several_authorities(live: LiveCoordinator, tmp_path: Path) -> None:
    """A silo whose certificate is of its hospital's own authority is admitted once that one is named, until revoked."""
    own = Authority.create(tmp_path / "hospital", "hospital", ["elsewhere"])
    kit, first = live.folder / "ca" / "coordinator", live.folder / "ca" / "coordinator" / "crl.pem"
    of_first = first.read_bytes()
    hospital = Kit(tmp_path / "other")
    request = make_request(hospital.folder, "east")
    own._issue(request, hospital.folder, ["spiffe://demo/silo/east"], (), is_server=False)
    shutil.copy(kit / "ca.pem", hospital.ca)  # whom the silo trusts

    def is_admitted() -> bool:
        client = Client(live.address, hospital, gives_up_after=0)
        try:
            client.ask("GET", "/v1/check")
        except (OSError, CallRefused, NotAdmitted):
            return False
        finally:
            client.close()
        return True

    assert not is_admitted()
    for file in ("ca.pem", "crl.pem"):
        (kit / file).write_bytes((kit / file).read_bytes() + (own.folder / "coordinator" / file).read_bytes())
    wait_until(is_admitted, "the hospital's authority")
    TinySilo(live.folder, live.address, "north").join()  # one of the first authority is admitted as before
    serial = x509.load_pem_x509_certificate(hospital.cert.read_bytes()).serial_number
    content = json.loads((own.folder / "federation.json").read_text())
    (own.folder / "federation.json").write_text(json.dumps({**content, "revoked": [serial]}))
    own.write_crl()
    first.write_bytes(of_first + (own.folder / "coordinator" / "crl.pem").read_bytes())
    wait_until(lambda: not is_admitted(), "the hospital's list")


# ---- deployment

DEPLOY = REPOSITORY / "deploy"


def commands() -> dict[str, list[str]]:
    """By file, the words after ``lightning-fl`` that it runs."""
    found = {}
    for unit in ("coordinator", "silo"):
        text = (DEPLOY / f"lightning-fl-{unit}.service").read_text()
        line = next(line for line in text.splitlines() if line.startswith("ExecStart="))
        found[unit] = shlex.split(line.partition("=")[2])[1:]
    *_, job = yaml.safe_load_all((DEPLOY / "silo.yaml").read_text())
    (container,) = job["spec"]["template"]["spec"]["containers"]
    return {**found, "pod": container["args"]}


def test_what_is_deployed_runs_commands_that_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert [words[0] for words in commands().values()] == ["coordinator", "fit", "fit"]
    for place, words in commands().items():
        with suppress(SystemExit):
            main([words[0], "--help"])
        helped = capsys.readouterr().out
        for option in words[1:]:
            if option.startswith("--") and not option.startswith("--trainer."):
                assert option in helped, (place, option)
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    assert 'ENTRYPOINT ["lightning-fl"]' in dockerfile
    for line in dockerfile.splitlines():
        if line.startswith("COPY"):
            assert all((REPOSITORY / name).exists() for name in line.split()[1:-1]), line


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_has_no_complaint(tmp_path: Path) -> None:
    for unit in ("coordinator", "silo"):
        text = (
            (DEPLOY / f"lightning-fl-{unit}.service")
            .read_text()
            .replace("/opt/lightning-fl/bin/lightning-fl", "/bin/true")
        )
        path = tmp_path / f"lightning-fl-{unit}.service"
        path.write_text(text)
        done = subprocess.run(["systemd-analyze", "verify", str(path)], capture_output=True, text=True, check=False)
        complaints = [line for line in done.stderr.splitlines() if path.name in line]
        assert (done.returncode, complaints) == (0, [])
