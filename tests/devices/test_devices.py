"""Devices without torch, over HTTP, against FedAvg in one process; a gateway that is killed; a browser."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning_fl_device as device
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import lightning_fl as fl
from lightning_fl.cli.coordinator import make_object
from lightning_fl.cli.main import main
from lightning_fl.coordinator import wire
from lightning_fl.coordinator.audit import verify
from lightning_fl.coordinator.export import read_model
from lightning_fl.devices.admission import AdmissionRules
from lightning_fl.devices.config import read_config
from lightning_fl.models import MLPClassifier
from lightning_fl.schedules import Asynchronous, Buffered, Polynomial
from tests.helpers.devices import NAMES, LiveGateway, check_in, gateway, send, write_step
from tests.helpers.distributed import PATIENCE, REPOSITORY
from tests.helpers.documents import blocks
from tests.helpers.network import make_kits
from tests.helpers.training import trainer

SIZES = {"a": 40, "b": 25, "c": 60}


def shards() -> dict[str, tuple[Tensor, Tensor]]:
    """Each device's digits."""
    from sklearn.datasets import load_digits

    found = load_digits()
    x = torch.from_numpy(found.images).float().unsqueeze(1) / 16
    y = torch.from_numpy(found.target).long()
    ends = np.cumsum(list(SIZES.values()))
    rows = {name: slice(end - size, end) for (name, size), end in zip(SIZES.items(), ends, strict=True)}
    return {name: (x[own], y[own]) for name, own in rows.items()}


def in_one_process(step: Path, rounds: int, **settings: Any) -> dict[str, Tensor]:
    """The model of FedAvg with the same clients in one process."""
    module = MLPClassifier(hidden=[16], lr=0.1)
    module.load_state_dict(load_file(step.with_suffix(".safetensors")))
    loaders = {name: DataLoader(TensorDataset(*own), batch_size=10) for name, own in shards().items()}
    own = trainer(fl.FederatedStrategy("fedavg", **settings), max_epochs=rounds, limit_val_batches=0)
    own.fit(module, fl.datamodules.ClientLoaders(loaders), loaders["a"])
    return module.state_dict()


def difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(float((found[name] - expected[name]).abs().max()) for name in expected)


def start(address: str, token: str, name: str, **options: Any) -> threading.Thread:
    """A device in a thread."""
    data = {str(index): own.numpy() for index, own in enumerate(shards()[name])}
    thread = threading.Thread(target=device.Device(address, token, data, **options).run, daemon=True)
    thread.start()
    return thread


def test_three_devices_are_fedavg_in_one_process(tmp_path: Path, digits_step: Path) -> None:
    own = gateway(tmp_path, Buffered(3), step=digits_step, rounds=3, epochs=2, shuffle=False)
    with LiveGateway(own) as live:
        threads = [start(live.address, (tmp_path / f"{name}.token").read_text(), name) for name in NAMES]
        for thread in threads:
            thread.join(PATIENCE)
    assert [entry["members"] for entry in own.progress.history] == [list(NAMES)] * 3
    assert [entry["num_steps"] for entry in own.progress.history] == [2 * (4 + 3 + 6)] * 3
    found, _ = read_model(own.store.root)
    assert difference(found, in_one_process(digits_step, 3, local_epochs=2)) < 1e-5
    assert difference(found, load_file(digits_step.with_suffix(".safetensors"))) > 0.1
    assert own.progress.history[-1]["train_loss"] < own.progress.history[0]["train_loss"]


# ---- over HTTP


def test_over_http_what_is_no_update_is_refused_and_counted(tmp_path: Path) -> None:
    own = gateway(tmp_path, Buffered(2), rules=AdmissionRules(("charging",)), rounds=1)
    token = (tmp_path / "a.token").read_text()
    with LiveGateway(own) as live:

        def call(method: str, path: str, body: Any, token: str = token) -> tuple[int, dict[str, Any]]:
            connection = http.client.HTTPConnection("127.0.0.1", live.port, timeout=PATIENCE)
            try:
                connection.request(method, path, body, {"Authorization": f"Bearer {token}"})
                answer = connection.getresponse()
                return answer.status, json.loads(answer.read() or b"{}")
            finally:
                connection.close()

        asks = json.dumps({"protocol": 1, "conditions": ["charging"]}).encode()
        assert call("POST", "/v1/checkin", asks, token="a.guess")[0] == 401
        assert call("POST", "/v1/checkin", b'{"protocol": 1}')[0] == 412
        assert call("POST", "/v1/checkin", b'{"protocol": 2}')[0] == 422
        assert call("POST", "/v1/checkin", b"[" * 60_000)[0] == 400
        assert call("POST", "/v1/checkin", b" " * 100_000)[0] == 413
        status, task = call("POST", "/v1/checkin", asks)
        assert (status, task["version"], task["step_digest"]) == (200, 0, device.hashlib.sha256(b"a graph").hexdigest())
        path = f"/v1/updates?task={task['task']}"
        fields = {"version": 0, "num_examples": 1, "num_steps": 1, "loss": 1.0}
        good = device.encode({device.DELTA + "x": np.ones(3)}, fields)
        assert call("PUT", path, bytes(1_000_000))[0] == 413
        assert call("PUT", path, iter([bytes(50_000)] * 20))[0] == 413  # without a length
        assert call("PUT", path, device.encode({device.DELTA + "x": np.full(3, np.inf)}, fields))[0] == 422
        assert call("PUT", "/v1/updates?task=0.1.2", good)[0] == 403
        assert call("PUT", path, good, token=(tmp_path / "b.token").read_text())[0] == 403
        assert call("PUT", path, good)[0] == 200
        status, answer = call("PUT", path, good)
        assert (status, answer["digest"]) == (409, device.hashlib.sha256(good).hexdigest())
        assert call("GET", "/v1/models/7", b"")[0] == 410
        assert call("GET", "/v1/models/../../secret", b"")[0] == 404
        expected = {
            "token": 1,
            "condition": 1,
            "malformed": 3,
            "oversized": 3,
            "not finite": 1,
            "task": 2,
            "replay": 1,
            "late": 1,
        }
        assert own.refusals.counts == expected
        metrics = live.metrics()
    assert list((own.store.root / "arriving").iterdir()) == []
    assert list(own.arrived) == ["a"]
    assert 'lightning_fl_refused_total{reason="not finite"} 1' in metrics.splitlines()
    # What the last row of the dashboard shows.
    dashboard = json.loads((REPOSITORY / "deploy" / "grafana.json").read_text())
    shown = {name for panel in dashboard["panels"][-3:] for name in re.findall(r"lightning_fl_\w+", json.dumps(panel))}
    assert shown == {*re.findall(r"^lightning_fl_\w+", metrics, re.MULTILINE)} - {
        "lightning_fl_round",
        "lightning_fl_devices",
    }


def test_no_request_stops_what_others_send(tmp_path: Path, monkeypatch: Any) -> None:
    own = gateway(tmp_path, Buffered(3))
    (pages := tmp_path / "pages").mkdir()
    (pages / "index.html").write_text("<p>")
    token, log = (tmp_path / "a.token").read_text(), own.store.root / "audit.jsonl"
    body = device.encode(
        {device.DELTA + "x": np.ones(3)}, {"version": 0, "num_examples": 1, "num_steps": 1, "loss": 1.0}
    )
    with LiveGateway(own, pages) as live, socket.create_connection(("127.0.0.1", live.port), PATIENCE) as slow:

        def call(method: str, path: str, body: bytes | None = None, **headers: str) -> int:
            connection = http.client.HTTPConnection("127.0.0.1", live.port, timeout=PATIENCE)
            try:
                connection.request(method, path, body, {"Authorization": f"Bearer {token}", **headers})
                return connection.getresponse().status
            finally:
                connection.close()

        task = (own.check_in("a", {"protocol": 1}) or {})["task"]
        slow.sendall(put(token, task, len(body)) + body[:50])
        assert call("GET", "/" + "a" * 300, Authorization="") == 404
        with urllib.request.urlopen(live.address) as answer:
            assert "default-src 'self'" in answer.headers["Content-Security-Policy"]
        assert call("GET", "/v1/step", Authorization="Bearer a.\xff") == 401
        assert call("GET", "/v1/models/%C2%B2") == 410
        assert call("POST", "/v1/checkin", b"garbage", **{"Content-Encoding": "gzip"}) == 400
        assert call("POST", "/v1/checkin", b"{}", **{"Content-Type": "application/json; charset=none"}) == 422
        other = (tmp_path / "b.token").read_text()
        with monkeypatch.context() as patch:  # what a broken line of TLS raises

            async def read(*_: Any) -> bytes:
                raise ssl.SSLError(1, "bad record")

            patch.setattr("aiohttp.StreamReader.read", read)
            assert call("PUT", "/v1/updates?task=0", b"x", Authorization=f"Bearer {other}") == 408
        slow.sendall(body[50:])
        assert slow.recv(100).startswith(b"HTTP/1.1 200")
    assert '"restart"' not in log.read_text()


def put(token: str, task: str, length: int) -> bytes:
    """The head of an upload."""
    head = f"PUT /v1/updates?task={task} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n"
    return f"{head}Content-Length: {length}\r\n\r\n".encode()


def test_an_upload_whose_connection_has_broken_does_not_hold_the_next_one_up(tmp_path: Path) -> None:
    own = gateway(tmp_path, Buffered(2))
    token, task = (tmp_path / "a.token").read_text(), (check_in(own, "a") or {})["task"]
    update = {"x": np.ones(3)}
    with LiveGateway(own) as live, socket.create_connection(("127.0.0.1", live.port), PATIENCE) as broken:
        broken.sendall(put(token, task, 500) + b"x" * 50)
        until = time.monotonic() + PATIENCE
        while not list((own.store.root / "arriving").glob("*")) and time.monotonic() < until:
            time.sleep(0.01)
        fields = {"version": 0, "num_examples": 1, "num_steps": 1, "loss": 1.0}
        device.Device(live.address, token, {"0": np.ones(1)}, patience=0).send({"task": task}, update, fields)
        assert list(own.arrived) == ["a"]
        broken.sendall(b"x" * 450)
        assert broken.recv(100).startswith(b"HTTP/1.1 429")
    assert list((own.store.root / "arriving").iterdir()) == []


def test_slow_and_silent_connections_are_closed(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("lightning_fl.devices.http_gateway.HEADER_S", 0.3)
    own = gateway(tmp_path, Buffered(3), rules=AdmissionRules(task_s=0.5))
    token, task = (tmp_path / "a.token").read_text(), (check_in(own, "a") or {})["task"]
    with LiveGateway(own) as live:
        silent, half, slow = (socket.create_connection(("127.0.0.1", live.port), PATIENCE) for _ in range(3))
        half.sendall(b"GET / HTTP/1.1\r\nHost")
        slow.sendall(put(token, task, 500))
        assert silent.recv(1) == half.recv(1) == b""
        slow.settimeout(0.05)
        answer = b""
        for _ in range(100):  # each byte comes in time, all of them don't
            slow.sendall(b"x")
            try:
                answer = slow.recv(100)
                break
            except TimeoutError:
                continue
        assert answer.startswith(b"HTTP/1.1 408")
        for own_socket in (silent, half, slow):
            own_socket.close()


def test_a_device_has_a_few_requests_at_a_time(tmp_path: Path) -> None:
    own = gateway(tmp_path, Buffered(3))
    send(own, "a", check_in(own, "a") or {}, 1.0)  # so that its check-ins are held
    token = (tmp_path / "a.token").read_text()
    with LiveGateway(own) as live:
        held = [http.client.HTTPConnection("127.0.0.1", live.port, timeout=PATIENCE) for _ in range(5)]
        for connection in held:
            connection.request("POST", "/v1/checkin", b'{"protocol": 1}', {"Authorization": f"Bearer {token}"})
            time.sleep(0.05)
        answer = held[-1].getresponse()
        assert (answer.status, answer.headers["Retry-After"]) == (429, "1")
        for connection in held:
            connection.close()


@pytest.mark.slow
def test_a_device_that_does_not_read_is_given_up(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("lightning_fl.devices.http_gateway.IDLE_S", 0.3)
    step = write_step(tmp_path)
    save_file({"x": torch.zeros(10_000_000)}, step.with_suffix(".safetensors"))
    own = gateway(tmp_path, Buffered(3), step=step)
    token = (tmp_path / "a.token").read_text()
    with LiveGateway(own) as live, socket.create_connection(("127.0.0.1", live.port), PATIENCE) as lazy:
        lazy.sendall(f"GET /v1/models/0 HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {token}\r\n\r\n".encode())
        time.sleep(2.0)
        read = 0
        with contextlib.suppress(ConnectionError):
            while piece := lazy.recv(1 << 20):
                read += len(piece)
        assert read < 40_000_000
        request = urllib.request.Request(f"{live.address}/v1/models/0", headers={"Authorization": f"Bearer {token}"})
        assert len(urllib.request.urlopen(request).read()) > 40_000_000


def test_a_device_waits_as_long_as_it_is_told_to(monkeypatch: Any) -> None:
    asked, slept = iter(["2", "86400"]), []

    def urlopen(request: Any, timeout: float) -> Any:
        raise urllib.error.HTTPError(request.full_url, 429, "", {"Retry-After": next(asked)}, io.BytesIO(b"{}"))

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    monkeypatch.setattr("time.sleep", slept.append)
    with pytest.raises(device.Refused):  # not for a day
        device.Device("http://x", "a.b", {"0": np.ones(1)}).check_in()
    assert [2 <= seconds <= 3 for seconds in slept] == [True]


def test_an_order_of_examples_is_the_same_in_every_language() -> None:
    # The numbers are those of the JavaScript of devices/web, which the test with a browser runs.
    assert device.shuffled(10, "0/3/a/0").tolist() == [5, 1, 3, 7, 9, 8, 0, 6, 2, 4]
    assert sorted(device.shuffled(1000, "x").tolist()) == list(range(1000))
    task = {"batch_size": 4, "epochs": 2, "steps": None, "shuffle": False, "seed": 0, "version": 0, "device": "a"}
    assert [len(rows) for rows in device.batches(task, 10)] == [4, 4, 2, 4, 4, 2]
    assert [len(rows) for rows in device.batches({**task, "steps": 5}, 10)] == [4, 4, 2, 4, 4]


# ---- the command


CONFIG = """
strategy: {{class_path: FederatedStrategy, init_args: {{algorithm: fedavg, local_epochs: 1}}}}
schedule: {{class_path: Buffered, init_args: {{size: 3}}}}
step: {step}
folder: federation
rounds: {rounds}
lr: 0.1
batch_size: 10
max_examples: 100
shuffle: false
port: {port}
admin_port: null
"""


def write_config(folder: Path, step: Path, port: int, rounds: int, more: str = "") -> Path:
    path = folder / "gateway.yaml"
    path.write_text(CONFIG.format(step=step, port=port, rounds=rounds) + more)
    return path


def test_a_configuration_that_is_wrong_is_named(tmp_path: Path, digits_step: Path, capsys: Any) -> None:
    for more, message in (
        ("host: 0.0.0.0\n", "there is no certificate"),
        ("condition: [charging]\n", "unknown entries 'condition'"),
        ("task_s: soon\n", "expected int or float"),
        ("rounds: 0\n", "expected a positive number"),
        ("pages: .\n", "which contains the private"),
        ("pages: federation/pages\ndevices: federation/pages/devices.json\n", "which contains the private"),
    ):
        with pytest.raises(SystemExit):
            main(["gateway", "--config", str(write_config(tmp_path, digits_step, 0, 1, more))])
        assert message in capsys.readouterr().err
    path = write_config(tmp_path, digits_step, 0, 1)
    path.write_text(path.read_text().replace("max_examples: 100\n", ""))
    with pytest.raises(ValueError, match=r"lacks max_examples\. A device's weight"):
        read_config(path)
    (path := tmp_path / "documented.yaml").write_text(blocks(REPOSITORY / "docs" / "howto" / "devices.md", "text")[0])
    assert read_config(path).rules == AdmissionRules(("charging", "unmetered"), updates_per_day=4, max_norm=1000)
    assert make_object(Asynchronous, read_config(path).schedule) == Buffered(100, None, Polynomial(0.5), 10)
    main(["gateway", "--config", str(write_config(tmp_path, digits_step, 0, 1)), "--enrol", "a", "b"])
    tokens = capsys.readouterr().out.split()
    assert [token.partition(".")[0] for token in tokens] == ["a", "b"]


# ---- processes (slow)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextmanager
def process(*words: str, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """A command that is ended with the block."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), **variables}
    own = subprocess.Popen([sys.executable, *words], env=env, stdout=subprocess.PIPE, text=True)
    try:
        yield own
    finally:
        own.kill()
        own.communicate()


def enrol(config: Path, names: tuple[str, ...], capsys: Any) -> dict[str, str]:
    capsys.readouterr()
    main(["gateway", "--config", str(config), "--enrol", *names])
    return dict(zip(names, capsys.readouterr().out.split(), strict=True))


WITHOUT_TORCH = "import sys; sys.modules['torch'] = None; import lightning_fl_device; lightning_fl_device.main()"


@contextmanager
def device_process(folder: Path, address: str, name: str, token: str) -> Iterator[subprocess.Popen[str]]:
    """The command of a device, in a process that can't import torch."""
    save_file(
        {str(index): own.contiguous() for index, own in enumerate(shards()[name])}, folder / f"{name}.safetensors"
    )
    (folder / f"{name}.token").write_text(token)
    files = ("--token-file", str(folder / f"{name}.token"), "--data", str(folder / f"{name}.safetensors"))
    code = f"import sys; sys.path.insert(0, {str(REPOSITORY / 'devices' / 'python')!r}); {WITHOUT_TORCH}"
    with process("-c", code, address, *files, SSL_CERT_FILE=str(folder / "ca" / "coordinator" / "ca.pem")) as own:
        yield own


@pytest.mark.slow
def test_a_gateway_with_tls_that_is_killed_again_and_again(tmp_path: Path, digits_step: Path, capsys: Any) -> None:
    rounds, port = 12, free_port()
    make_kits(tmp_path, ())
    certificate = "certificate: ca/coordinator/cert.pem\nkey: ca/coordinator/key.pem\nhost: 0.0.0.0\n"
    config = write_config(tmp_path, digits_step, port, rounds, certificate)
    tokens, address = enrol(config, NAMES, capsys), f"https://127.0.0.1:{port}"
    command = ("-m", "lightning_fl", "gateway", "--config", str(config))
    log, folder = tmp_path / "federation" / "audit.jsonl", tmp_path / "federation"

    def finished() -> int:
        return sum(json.loads(line)["event"] == "round closed" for line in log.read_text().splitlines())

    with (
        device_process(tmp_path, address, "a", tokens["a"]) as a,
        device_process(tmp_path, address, "b", tokens["b"]) as b,
        device_process(tmp_path, address, "c", tokens["c"]) as c,
    ):
        for kill_after in (3, 8, None):
            with process(*command) as server:
                assert server.stdout is not None
                assert server.stdout.readline().startswith("Serving 12 rounds on https://")
                if kill_after is None:
                    printed = [own.communicate(timeout=PATIENCE)[0] for own in (a, b, c)]
                else:
                    until = time.monotonic() + PATIENCE
                    while finished() < kill_after and time.monotonic() < until:
                        time.sleep(0.01)
                    server.send_signal(signal.SIGKILL)
    assert printed == [f"{rounds} updates were taken.\n"] * 3
    found, facts = read_model(folder)
    assert facts["round"] == rounds
    assert difference(found, in_one_process(digits_step, rounds)) < 1e-5
    history = json.loads((folder / "state.json").read_text())["progress"]["history"]
    assert [entry["members"] for entry in history] == [list(NAMES)] * rounds
    verify(log)


WEB = REPOSITORY / "devices" / "web"


def built_pages() -> Path:
    """The web page, built from its source by npm."""
    if not (WEB / "node_modules").is_dir():
        subprocess.run(["npm", "ci", "--no-audit", "--no-fund"], cwd=WEB, check=True, timeout=PATIENCE)
    subprocess.run(["npm", "run", "build"], cwd=WEB, check=True, timeout=PATIENCE)
    return WEB / "dist"


@contextmanager
def browser(folder: Path, address: str) -> Iterator[None]:
    """Chromium without a window, at a page."""
    words = (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        f"--user-data-dir={folder / 'profile'}",
    )
    own = subprocess.Popen([CHROMIUM, *words, address], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        own.terminate()  # ends its other processes, too
        own.wait(PATIENCE)


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or ""
needs_browser = pytest.mark.skipif(not (CHROMIUM and shutil.which("npm")), reason="needs npm and Chromium")


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize("shuffle", [False, True])
def test_a_browser_and_two_python_devices(tmp_path: Path, digits_step: Path, shuffle: bool) -> None:
    rounds = 5
    own = gateway(tmp_path, Buffered(3), step=digits_step, rounds=rounds, shuffle=shuffle)
    tokens = {name: (tmp_path / f"{name}.token").read_text() for name in NAMES}
    pages = shutil.copytree(built_pages(), tmp_path / "pages")
    save_file({str(index): part.contiguous() for index, part in enumerate(shards()["c"])}, pages / "c.safetensors")
    with LiveGateway(own, pages) as live:
        threads = [start(live.address, tokens[name], name) for name in ("a", "b")]
        with browser(tmp_path, f"{live.address}/#token={tokens['c']}&data=c.safetensors"):
            for thread in threads:
                thread.join(PATIENCE)
        assert [entry["members"] for entry in own.progress.history] == [list(NAMES)] * rounds
        # Another Python device with the browser's name and examples does what the browser did in the last round.
        last = own.store.folder(rounds - 1, "update")
        (sent,) = last.glob("c.*.ok")
        fields, found = wire.read_header(sent).fields, wire.read(sent)
        twin = device.Device(live.address, tokens["a"], {str(i): part.numpy() for i, part in enumerate(shards()["c"])})
        task = {**own.plan.to_json(), "version": rounds - 1, "device": "c", "step_digest": wire.sha256(digits_step)}
        update, said = twin.train(task)
    assert {name: fields[name] for name in ("num_examples", "num_steps", "version")} == {
        name: said[name] for name in ("num_examples", "num_steps", "version")
    }
    assert fields["loss"] == pytest.approx(said["loss"], abs=1e-5)
    for name, delta in update.items():
        np.testing.assert_allclose(found[device.DELTA + name].numpy(), delta, atol=1e-5)
        assert np.abs(delta).max() > 1e-3
    if not shuffle:
        assert difference(read_model(own.store.root)[0], in_one_process(digits_step, rounds)) < 1e-5
