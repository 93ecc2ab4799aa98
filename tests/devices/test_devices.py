"""Devices without torch, over HTTP, against FedAvg in one process; a gateway that is killed; a browser."""

from __future__ import annotations

import http.client
import json
import threading
from pathlib import Path
from typing import Any

import lightning_fl_device as device
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import lightning_fl as fl
from lightning_fl.cli.main import main
from lightning_fl.coordinator.export import read_model
from lightning_fl.devices.admission import AdmissionRules
from lightning_fl.models import MLPClassifier
from lightning_fl.schedules import Buffered
from tests.helpers.devices import NAMES, LiveGateway, gateway
from tests.helpers.distributed import PATIENCE

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
    trainer(fl.FederatedStrategy("fedavg", **settings), max_epochs=rounds, limit_val_batches=0).fit(
        module, train_dataloaders=fl.datamodules.ClientLoaders(loaders)
    )
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
    assert list((own.store.root / "arriving").iterdir()) == []
    assert list(own.arrived) == ["a"]


def test_an_order_of_examples_is_the_same_in_every_language() -> None:
    # The numbers are those of the JavaScript of devices/web, which the test with a browser runs.
    assert device.shuffled(10, "0/3/a/0").tolist() == [5, 1, 3, 7, 9, 8, 0, 6, 2, 4]
    assert sorted(device.shuffled(1000, "x").tolist()) == list(range(1000))
    task = {"batch_size": 4, "epochs": 2, "steps": None, "shuffle": False, "seed": 0, "version": 0, "device": "a"}
    assert [len(rows) for rows in device.batches(task, 10)] == [4, 4, 2, 4, 4, 2]
    assert [len(rows) for rows in device.batches({**task, "steps": 5}, 10)] == [4, 4, 2, 4, 4]


# ---- the command


CONFIG = """
strategy:
  class_path: FederatedStrategy
  init_args:
    algorithm: fedavg
    local_epochs: 1
    schedule: {{class_path: Buffered, init_args: {{size: 3}}}}
step: {step}
folder: federation
rounds: {rounds}
lr: 0.1
batch_size: 10
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
        ("task_s: soon\n", "that is no int or float"),
        ("rounds: 0\n", "expected a positive number"),
    ):
        with pytest.raises(SystemExit):
            main(["gateway", "--config", str(write_config(tmp_path, digits_step, 0, 1, more))])
        assert message in capsys.readouterr().err
    main(["gateway", "--config", str(write_config(tmp_path, digits_step, 0, 1)), "--enrol", "a", "b"])
    tokens = capsys.readouterr().out.split()
    assert [token.partition(".")[0] for token in tokens] == ["a", "b"]
