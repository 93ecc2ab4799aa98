"""What a server answers; its parts in this process, and the whole over HTTP (slow)."""

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import lightning_fl as fl
from lightning_fl.cli.main import main
from lightning_fl.clients.state_files import StateFiles
from lightning_fl.datamodules import DigitsDataModule
from lightning_fl.models import MLPClassifier
from lightning_fl.serving import load_module, server
from lightning_fl.serving.models import ServedModels, decode
from lightning_fl.serving.server import MAX_BYTES, Gate, ModelAPI
from lightning_fl.strategies.checkpoint import state_files
from tests.helpers.distributed import PATIENCE
from tests.helpers.training import trainer

MODULE = "lightning_fl.models.MLPClassifier"


def start(checkpoint: Path, **settings: Any) -> ModelAPI:
    api = ModelAPI(checkpoint, MODULE, (1, 8, 8), **settings)
    api.setup("cpu")
    return api


def ask(api: ModelAPI, *bodies: dict[str, Any]) -> list[Any]:
    """The answers to requests that are computed together."""
    requests = [api.decode_request(body) for body in bodies]  # type: ignore[arg-type]
    answers = [api.encode_response(answer) for answer in api.unbatch(api.predict(api.batch(requests)))]
    return [answer if isinstance(answer, dict) else (answer.status_code, json.loads(answer.body)) for answer in answers]


def outputs_of(state: dict[str, Tensor], x: Tensor) -> Tensor:
    module = MLPClassifier(hidden=[16]).eval()
    module.load_state_dict(state)
    with torch.no_grad():
        return module(x)


def state_of(checkpoint: Path) -> dict[str, Tensor]:
    return torch.load(checkpoint, weights_only=True)["state_dict"]


def test_requests_that_are_computed_together_get_their_own_answers(checkpoint: Path) -> None:
    api = start(checkpoint, serves_clients=True)
    x = [torch.rand(size, 1, 8, 8) for size in (1, 3, 2)]
    bad = {"inputs": [[1.0]], "client": None}
    found = ask(
        api,
        {"inputs": x[0].tolist(), "client": None},
        bad,
        {"inputs": x[1].tolist(), "client": "2"},
        {"inputs": x[2].tolist(), "client": None},
        {"inputs": x[2].tolist(), "client": "nobody"},
    )
    torch.testing.assert_close(torch.tensor(found[0]["outputs"]), outputs_of(state_of(checkpoint), x[0]))
    torch.testing.assert_close(torch.tensor(found[2]["outputs"]), outputs_of(fl.load_client(checkpoint, 2), x[1]))
    torch.testing.assert_close(torch.tensor(found[3]["outputs"]), outputs_of(state_of(checkpoint), x[2]))
    assert found[1] == (400, {"detail": "Expected numbers of shape [examples, 1, 8, 8], found [1, 1]."})
    assert found[4][0] == 404
    assert found[0]["round"] == 2


def test_a_request_that_the_model_cannot_compute_fails_alone(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    api = start(checkpoint)
    compute = api.models.compute

    def of_known_words(tensors: Any, inputs: Any) -> Any:
        if float(inputs[0].max()) > 100:
            raise IndexError("index out of range in self")
        return compute(tensors, inputs)

    monkeypatch.setattr(api.models, "compute", of_known_words)
    x = torch.rand(2, 1, 8, 8)
    first, bad, last = ask(api, *({"inputs": one.tolist(), "client": None} for one in (x, x + 1000, x)))
    expected = outputs_of(state_of(checkpoint), x)
    torch.testing.assert_close(torch.tensor(first["outputs"]), expected)
    torch.testing.assert_close(torch.tensor(last["outputs"]), expected)
    assert bad[0] == 422
    assert "index" not in bad[1]["detail"]


def test_what_clients_share_is_in_memory_once(checkpoint: Path) -> None:
    version = start(checkpoint, serves_clients=True).models.current
    first, second = version.tensors("1"), version.tensors("2")
    held = {name: value.data_ptr() for name, value in version.state.items()}
    for name in held:
        is_shared = not name.startswith("net.3.")
        assert (first[name].data_ptr() == second[name].data_ptr() == held[name]) is is_shared, name


def test_no_file_is_read_for_a_client_that_does_not_exist(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    api = start(checkpoint, serves_clients=True)
    read: list[Any] = []

    def lost(self: StateFiles, client: Any, name: str) -> Any:
        read.append(client)
        raise FileNotFoundError(name)

    monkeypatch.setattr(StateFiles, "read", lost)
    x = torch.rand(1, 1, 8, 8).tolist()
    found = ask(api, *({"inputs": x, "client": client} for client in ("nobody", "3", "9" * 5000, "02", "1")))
    assert [status for status, _ in found] == [404, 404, 404, 410, 410]
    assert read == [2, 1]


def test_a_clients_model_is_that_of_the_round_that_is_named(checkpoint: Path) -> None:
    """Training goes on while a server answers: it deletes what the newest checkpoint does not need."""
    old, served = checkpoint.parent, Path("run", "last.ckpt")
    shutil.copytree(old, served.parent)
    x = torch.rand(2, 1, 8, 8)
    body = {"inputs": x.tolist(), "client": "1"}
    first, watching = start(served, serves_clients=True), start(served, serves_clients=True)
    watching.watches = True  # as with --watch, but for its thread
    before = outputs_of(fl.load_client(served, 1), x)
    files = state_files(served)
    content = torch.load(served, weights_only=True)
    personal = {name: torch.zeros_like(value) for name, value in content["state_dict"].items() if "net.3" in name}
    manifest = files.write_manifest({1: files.write(1, {"personal": personal})})
    files.name(served.name, [manifest], also_old=True)  # as training does it: the states before the checkpoint
    content["lightning_fl"]["manifests"] = [manifest]
    torch.save(content, served)
    (found,) = ask(first, body)
    torch.testing.assert_close(torch.tensor(found["outputs"]), before)  # the round that it names, not the file's
    for path in [*files.root.glob("manifests/*"), *files.root.glob("checkpoints/*")]:
        if manifest not in path.name:
            path.unlink()
    files.name(served.name, [manifest], also_old=False)
    files.collect()
    (found,) = ask(first, body)
    torch.testing.assert_close(torch.tensor(found["outputs"]), before)  # it is in memory
    assert ask(first, {**body, "client": "2"})[0][0] == 410
    (found,) = ask(watching, body)
    torch.testing.assert_close(torch.tensor(found["outputs"]), torch.zeros(2, 10))
    assert ask(watching, {**body, "client": "2"})[0][0] == 404  # the new round has none of it


class Frozen(MLPClassifier):
    """Its first layer is frozen, as the base of a fine-tuned model."""

    def __init__(self) -> None:
        super().__init__(hidden=[16])
        self.net[1].requires_grad_(False)


def test_a_checkpoint_without_its_frozen_base_needs_the_base(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    module = Frozen()
    fit = trainer(fl.FederatedStrategy("fedavg", num_clients=2, checkpoint_frozen=False), limit_train_batches=1)
    fit.fit(module, DigitsDataModule())
    fit.save_checkpoint("last.ckpt")
    words = ["export", "last.ckpt", "--to", "safetensors", "--module", f"{__name__}.Frozen", "--shape", "1,8,8"]
    with pytest.raises(SystemExit):
        main(words)  # a new module draws other weights
    assert "without frozen parameters (checkpoint_frozen=False)" in capsys.readouterr().err
    torch.save(module.state_dict(), "base.pt")
    main([*words, "--base", "base.pt"])
    exported = load_file("model.safetensors")
    for name, value in module.state_dict().items():
        torch.testing.assert_close(exported[name], value, rtol=0, atol=0)
    torch.save({name: value + 1 for name, value in module.state_dict().items()}, "other.pt")
    with pytest.raises(ValueError, match=r"differ from those .* Give the file that holds them with --base"):
        load_module("last.ckpt", f"{__name__}.Frozen", base="other.pt")
    api = ModelAPI(Path("last.ckpt"), f"{__name__}.Frozen", (1, 8, 8), base=Path("base.pt"))
    api.setup("cpu")
    x = torch.rand(2, 1, 8, 8)
    (found,) = ask(api, {"inputs": x.tolist(), "client": None})
    torch.testing.assert_close(torch.tensor(found["outputs"]), outputs_of(module.state_dict(), x))


def test_more_requests_than_may_wait_are_told_to_come_again() -> None:
    released = asyncio.Event()
    sent: list[Any] = []

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        await released.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def receive() -> Any:
        return {"type": "http.request", "body": b'{"inputs": [1]}', "more_body": False}

    async def send(message: Any) -> None:
        sent.append((message.get("status"), dict(message.get("headers", []))))

    async def many() -> None:
        gate = Gate(slow, max_requests=2)
        scope = {"type": "http", "path": "/predict", "method": "POST", "headers": []}
        calls = [asyncio.create_task(gate(dict(scope), receive, send)) for _ in range(3)]
        await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
        assert [(status, headers[b"retry-after"]) for status, headers in sent if status] == [(503, b"1")]
        released.set()
        await asyncio.gather(*calls)
        await gate(dict(scope), receive, send)  # there is room again

    asyncio.run(many())
    assert [status for status, _ in sent if status] == [503, 200, 200, 200]


def test_a_body_that_does_not_end_holds_no_place_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "BODY_S", 0.05)
    sent: list[Any] = []

    async def receive() -> Any:
        if not sent:
            await asyncio.sleep(3600)

    async def send(message: Any) -> None:
        sent.append(message.get("status"))

    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise AssertionError("the model was asked")

    gate = Gate(app, max_requests=1)
    asyncio.run(gate({"type": "http", "path": "/predict", "method": "POST", "headers": []}, receive, send))
    assert (sent[0], gate.num_waiting) == (408, 0)


def test_clients_are_not_served_unless_asked_for(checkpoint: Path) -> None:
    ((status, answer),) = ask(start(checkpoint), {"inputs": torch.rand(1, 1, 8, 8).tolist(), "client": "2"})
    assert status == 400
    assert "--clients" in answer["detail"]


@pytest.mark.parametrize(
    "inputs",
    [None, "text", 3, [], [[]], [["a"]], {"a": 1}, [[[[float("nan")] * 8] * 8]], [[[[1e999] * 8] * 8]], [None]],
)
def test_bad_inputs_are_refused_with_what_was_expected(inputs: Any) -> None:
    with pytest.raises(ValueError, match="Expected"):
        decode(inputs, [(1, 8, 8)], [torch.float32])


def test_fractions_are_not_cut_to_token_ids() -> None:
    (found,) = decode([[1, 2.0]], [(2,)], [torch.int64])
    assert found.tolist() == [[1, 2]]
    with pytest.raises(ValueError, match="Expected whole numbers"):
        decode([[1.9, 2]], [(2,)], [torch.int64])


def test_several_inputs_need_as_many_examples() -> None:
    found = decode([[[1.0], [2.0]], [[3], [4]]], [(1,), (1,)], [torch.float32, torch.int64])
    assert [one.tolist() for one in found] == [[[1.0], [2.0]], [[3], [4]]]
    with pytest.raises(ValueError, match="same number"):
        decode([[[1.0], [2.0]], [[3]]], [(1,), (1,)], [torch.float32, torch.int64])


def replace(checkpoint: Path, content: dict[str, Any]) -> None:
    unfinished = checkpoint.with_name("unfinished")
    torch.save(content, unfinished)
    unfinished.replace(checkpoint)


def with_factor(checkpoint: Path, factor: float) -> dict[str, Any]:
    content = torch.load(checkpoint, weights_only=True)
    content["state_dict"] = {name: value * factor for name, value in content["state_dict"].items()}
    return content


def test_a_new_checkpoint_is_taken_and_an_unsound_one_is_not(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    served = Path("last.ckpt")
    shutil.copy(checkpoint, served)
    models = ServedModels(MLPClassifier(hidden=[16]), served)
    first = models.current
    assert not models.refresh()  # nothing has happened
    replace(served, with_factor(checkpoint, 2.0))
    assert models.refresh()
    assert models.current.digest != first.digest
    kept = models.current
    unsound = [with_factor(checkpoint, float("nan")), {"state_dict": {"other": torch.zeros(1)}}]
    wrong_shape = with_factor(checkpoint, 1.0)
    wrong_shape["state_dict"]["net.3.bias"] = torch.zeros(3)
    for content in [*unsound, wrong_shape]:
        replace(served, content)
        assert not models.refresh()
    served.with_name("cut").write_bytes(checkpoint.read_bytes()[:1000])
    served.with_name("cut").replace(served)
    assert not models.refresh()
    served.unlink()
    assert not models.refresh()
    assert models.current is kept
    assert len([record for record in caplog.records if "Still serving round" in record.message]) == 4


class Masked(MLPClassifier):
    """Has a persistent buffer with infinities, as causal masks do."""

    def __init__(self) -> None:
        super().__init__(hidden=[16])
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))


def test_another_precision_and_an_infinite_mask_are_served() -> None:
    module, served = Masked(), Path("masked.ckpt")
    state = {name: value.to(torch.bfloat16) for name, value in module.state_dict().items()}
    torch.save({"state_dict": state}, served)
    assert ServedModels(module, served).current.state["net.1.weight"].dtype == torch.float32
    for name, bad in (("mask", torch.tensor([0.0, torch.nan])), ("mask", torch.tensor([torch.inf, -torch.inf]))):
        torch.save({"state_dict": {**state, name: bad}}, served)
        with pytest.raises(ValueError, match="not finite"):
            ServedModels(module, served)


def test_a_request_id_is_always_answered_by_the_same_model(checkpoint: Path) -> None:
    canary = Path("canary.ckpt")
    torch.save(with_factor(checkpoint, 2.0), canary)
    models = ServedModels(MLPClassifier(hidden=[16]), checkpoint, canary, share=0.25)
    chosen = {str(number): models.choose(str(number)) for number in range(2000)}
    share = sum(version is models.canary for version in chosen.values()) / len(chosen)
    assert abs(share - 0.25) < 4 * (0.25 * 0.75 / 2000) ** 0.5
    assert all(models.choose(name) is version for name, version in chosen.items())
    share = sum(models.choose(None) is models.canary for _ in range(2000)) / 2000
    assert abs(share - 0.25) < 6 * (0.25 * 0.75 / 2000) ** 0.5


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--share", "0.5"], "name the canary's checkpoint with --canary"),
        (["--workers", "0"], "must be at least 1"),
        (["--max-requests", "0"], "must be at least 1"),
        (["--base", "base.pt"], "would be ignored"),
        (["--shape", "8,x"], "is not a shape"),
    ],
)
def test_wrong_options_are_one_line(
    checkpoint: Path, words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["serve", str(checkpoint), "--module", MODULE, *words])
    assert sentence in capsys.readouterr().err


# ---- over HTTP


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def post(url: str, body: bytes, headers: dict[str, str] | None = None) -> tuple[int, dict[str, Any]]:
    request = urllib.request.Request(url + "/predict", data=body, headers=headers or {})
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def is_up(url: str) -> bool:
    try:
        with urllib.request.urlopen(url + "/health", timeout=PATIENCE) as answer:
            return answer.status == 200
    except OSError:
        return False


@pytest.mark.slow
def test_five_hundred_requests_while_five_rounds_replace_the_model(checkpoint: Path) -> None:
    served = Path("run", "last.ckpt").absolute()
    shutil.copytree(checkpoint.parent, served.parent)
    url = f"http://127.0.0.1:{(port := free_port())}"
    words = ["serve", str(served), "--watch", "--clients", "--port", str(port), "--module", MODULE, "--shape", "1,8,8"]
    process = subprocess.Popen(
        [sys.executable, "-m", "lightning_fl", *words], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )
    try:
        deadline = time.monotonic() + PATIENCE
        while not is_up(url):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
        x = torch.rand(2, 1, 8, 8)
        body = json.dumps({"inputs": x.tolist()}).encode()
        expected = {}
        _, first = post(url, body)
        expected[first["model"]] = outputs_of(state_of(served), x)
        answers = []
        with ThreadPoolExecutor(8) as threads:
            for factor in (1.1, 1.2, 1.3, 1.4, 1.5):
                content = with_factor(checkpoint, factor)
                waiting = [threads.submit(post, url, body) for _ in range(50)]
                replace(served, content)
                waiting += [threads.submit(post, url, body) for _ in range(50)]
                answers += [one.result() for one in waiting]
                while (answer := post(url, body))[1]["model"] in expected:
                    time.sleep(0.1)
                expected[answer[1]["model"]] = outputs_of(content["state_dict"], x)
        assert len(answers) == 500
        assert {status for status, _ in answers} == {200}
        for _, answer in answers:
            torch.testing.assert_close(torch.tensor(answer["outputs"]), expected[answer["model"]], rtol=1e-5, atol=1e-6)
        assert len({answer["model"] for _, answer in answers}) >= 5
        assert post(url, body, {"X-Client": "1"})[0] == 200
        assert post(url, body, {"X-Client": "nobody"})[0] == 404
        assert post(url, b"{no json")[0] == 400
        assert post(url, b" " * (MAX_BYTES + 1))[0] == 413
        assert post(url, b'{"inputs": [[1]]}')[0] == 400
        with urllib.request.urlopen(url + "/metrics", timeout=PATIENCE) as metrics:
            assert b'lightning_fl_requests_total{status="404"} 1.0' in metrics.read()
    finally:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        process.send_signal(signal.SIGTERM)
        process.wait(PATIENCE)
        _, alive = psutil.wait_procs(family, timeout=PATIENCE)
        for one in alive:
            one.kill()
    assert alive == []
