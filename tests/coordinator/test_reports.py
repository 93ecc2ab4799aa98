"""What silos report is JSON that may have any shape: it is refused before it is added up and passed on."""

from __future__ import annotations

import http.client
import json
import os
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_fl.communication import Message
from lightning_fl.coordinator import identity, wire
from lightning_fl.coordinator.client import CallRefused, Client
from lightning_fl.coordinator.identity import Kit
from lightning_fl.coordinator.report_check import check_evaluation, read_report
from lightning_fl.coordinator.service import Coordinator
from lightning_fl.engines import ScheduleEnd
from lightning_fl.federation import RankReport
from lightning_fl.federation.report_masking import mask, unmask
from lightning_fl.tree import flatten
from tests.helpers.distributed import PATIENCE
from tests.helpers.network import (
    ENTRY,
    EVALUATION,
    HOST,
    LiveCoordinator,
    TinySilo,
    in_threads,
    wait_until,
)

STATE = {"count": 2, "lengths": {"total": None, "seen": 2}, "is_sum": True}
TENSORS = {name: torch.ones(1) for name in ("accuracy/total/0", "accuracy/seen/0", "accuracy/seen/1")}
REPORT = RankReport(
    num_clients=1,
    weight=2.5,
    num_steps=3,
    schedule_end=ScheduleEnd(
        [1], [[{"lr": 0.1, "betas": (0.9, 0.999), "fused": None}]], 3, {"scale": 65536.0}, {0: {"best": 0.5}}
    ),
    failed=[("east", "row 17")],
    client_seconds=[("east", 1.5)],
    metrics={"loss": ENTRY},
    metric_states={"accuracy": STATE},
    tensors=TENSORS,
)


def sent(**changes: Any) -> Message:
    """The report as it comes from the network, with some fields changed."""
    message = REPORT.to_message()
    return Message(json.loads(json.dumps({**message.fields, **changes})), message.tensors)


def test_a_report_that_silos_send_is_read() -> None:
    read = read_report(sent(), "east")
    assert read.schedule_end == REPORT.schedule_end
    assert read.metrics["loss"]["weight"] == 8.0
    assert RankReport.join([read, read]).num_steps == 6


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("metrics", [1]),
        ("metrics", {"a": {}}),
        ("metrics", {"a": {**ENTRY, "value": "x"}}),
        ("metrics", {"a": {**ENTRY, "value": True}}),
        ("metrics", {"a": {**ENTRY, "reduction": "median"}}),
        ("metrics", {"a": {**ENTRY, "own": 1}}),
        ("metric_states", [3]),
        ("metric_states", {"accuracy": 3}),
        ("metric_states", {"accuracy": {**STATE, "lengths": {"total": 1 << 50}}}),
        ("metric_states", {"accuracy": {**STATE, "lengths": {"other": None}}}),
        ("metric_states", {"accuracy": {"shapes": {"total": [[2, -1], "float32"]}}}),
        ("metric_states", {"accuracy": {"shapes": {"total": [[2], "load"]}}}),
        ("moved", [[1]]),
        ("client_seconds", 5),
        ("client_seconds", [["east"]]),
        ("client_seconds", [["north", 1.0]]),
        ("failed", [["east", 1]]),
        ("lost", ["north"]),
        ("num_steps", -1),
        ("num_steps", True),
        ("num_examples", 1e400),
        ("squared_norm", float("inf")),
        ("should_stop", 1),
        ("deferred_checkpoints", {"model.ckpt": "x"}),
        ("grouping", [{}]),
        ("schedule_end", 5),
        ("schedule_end", {"dict": [["num_steps", 1]]}),
        ("schedule_end", {"dict": [["num_steps", ["x"]], ["options", []], ["num_optimizer_steps", 1]]}),
        ("unknown", 1),
    ],
)
def test_a_field_of_another_kind_is_refused(field: str, value: Any) -> None:
    with pytest.raises(wire.BadFile, match="east" if field in ("lost",) else "report"):
        read_report(sent(**{field: value}), "east")


def test_a_report_lacks_nothing_and_its_tensors_are_not_nested() -> None:
    message = sent()
    with pytest.raises(wire.BadFile, match="moved: Field required"):
        read_report(Message({name: value for name, value in message.fields.items() if name != "moved"}), "east")
    nested: Any = {**TENSORS, "more": {"deep": torch.ones(1)}}
    with pytest.raises(wire.BadFile, match="nested"):
        read_report(Message(message.fields, nested), "east")


def test_an_evaluation_is_read_or_refused() -> None:
    check_evaluation({"metrics": {"loss": ENTRY}, "metric_states": {"accuracy": STATE}}, TENSORS)
    for bad in ({}, {"metrics": {}, "metric_states": {}, "more": 1}, {"metrics": {"a": {"name": "a"}}}):
        with pytest.raises(wire.BadFile):
            check_evaluation({"metric_states": {}, **bad}, TENSORS)


def test_what_a_silo_claims_beyond_the_secure_sums_is_left_out() -> None:
    """A shape larger than that of the others, and a metric without a weight, have no sum."""
    own = Message({**REPORT.to_message().fields, "metric_states": {}})
    masked = mask(own)
    more = {
        "metrics": {"ghost": {**ENTRY, "name": "ghost"}, **masked.fields["metrics"]},
        "metric_states": {"accuracy": {"shapes": {"total": [[1 << 40], "float32"]}}},
    }
    sums = {**masked.fields["sums"], "state accuracy": 1.0, "metric ghost value": 1.0}
    first = Message({**masked.fields, "sums": sums})
    with pytest.warns(UserWarning, match="'ghost', 'accuracy'"):
        joined, _ = unmask([first, Message({**masked.fields, **more})])
    assert (list(joined.fields["metrics"]), joined.fields["metric_states"]) == (["loss"], {})


def damaged(fields: dict[str, Any], dtype: str, content: bytes) -> bytes:
    entry = {"dtype": dtype, "shape": [4], "data_offsets": [0, 16]}
    header = json.dumps({"__metadata__": {"__fields__": json.dumps(fields)}, "x": entry}).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content


def test_what_is_damaged_ends_neither_the_round_nor_the_coordinator(live: LiveCoordinator, tmp_path: Path) -> None:
    evaluation = {"message": EVALUATION}
    silos = [TinySilo(tmp_path, live.address, name).join() for name in ("east", "north", "south")]
    openings = in_threads(*(silo.open for silo in silos))
    client, file = silos[0].federation.client, tmp_path / "file"
    report = {**RankReport(num_clients=1).to_message().fields, "metrics": [1]}
    wire.write(file, flatten({"delta": {"x": torch.ones(3)}}), {"report": report, "weight": 1.0})
    with pytest.raises(CallRefused, match="metrics: Input should be a valid dictionary"):
        client.upload("/v1/rounds/0/update", file)
    in_threads(*(lambda s=s, o=o: s.send(o) for s, o in zip(silos, openings, strict=True)))
    for fields, dtype, content in (
        (evaluation, "F32", b"\0" * 3),
        (evaluation, "F8_E4M3", b"\0" * 16),
        ({"message": {"metrics": {"a": {}}}}, "F32", b"\0" * 16),
    ):
        file.write_bytes(damaged(fields, dtype, content))
        with pytest.raises(CallRefused, match="is refused") as caught:
            client.upload("/v1/rounds/0/evaluation.0", file)
        assert caught.value.status == 422
    for topic in ("junk.0", "evaluation.1", "evaluation.0.share"):
        with pytest.raises(CallRefused) as caught:
            client.upload(f"/v1/rounds/0/{topic}", file)
        assert caught.value.status == 400
    assert in_threads(*(silo.round for silo in silos)) == [2.0] * 3


def test_a_start_whose_tensors_are_nested_is_refused_and_another_taken(live: LiveCoordinator, tmp_path: Path) -> None:
    client, file = Client(live.address, Kit(tmp_path / "east")), tmp_path / "start"
    for name in ("params\x1fa\x1fb", "params"):
        wire.write(file, {"buffers\x1fx": torch.zeros(3), name: torch.zeros(3)}, {"common": {}})
        with pytest.raises(CallRefused, match="its tensors are nested"):
            client.upload("/v1/start", file)
    client.close()
    silos = [TinySilo(tmp_path, live.address, name).join() for name in ("east", "north", "south")]
    assert in_threads(*(silo.round for silo in silos)) == [1.0] * 3


def test_what_is_being_taken_in_is_not_added_to(
    live: LiveCoordinator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What counts is the file that was checked."""
    is_busy = threading.Event()
    is_busy.set()
    monkeypatch.setattr(Coordinator, "is_busy", lambda coordinator, topic: topic == "update" and is_busy.is_set())
    silos = [TinySilo(tmp_path, live.address, name).join() for name in ("east", "north", "south")]
    openings = in_threads(*(silo.open for silo in silos))
    file = tmp_path / "update"
    fields = {"report": RankReport(num_clients=1).to_message().fields, "weight": 1.0}
    digest = wire.write(file, flatten({"delta": {"x": torch.ones(3)}}), fields)
    size = file.stat().st_size
    own = threading.Thread(target=lambda: silos[0].federation.client.upload("/v1/rounds/0/update", file), daemon=True)
    own.start()
    wait_until(lambda: bool(live.server._taken_in), "the check")
    context = identity.client_context(Kit(tmp_path / "east"))
    connection = http.client.HTTPSConnection(HOST, live.port, context=context, timeout=PATIENCE)
    headers = {"Upload-Length": str(size + 4), "Upload-Offset": str(size)}
    connection.request("PUT", f"/v1/rounds/0/update/{digest}", b"evil", headers)
    assert connection.getresponse().status == 409
    connection.close()
    is_busy.clear()
    own.join(PATIENCE)
    (kept,) = (tmp_path / "federation" / "rounds" / "000000" / "update").glob("east.*.ok")
    assert wire.sha256(kept) == digest
    in_threads(*(lambda s=s, o=o: s.send(o) for s, o in zip(silos, openings, strict=True)))


def test_a_broken_tls_record_is_no_fault_of_the_disk(live: LiveCoordinator, tmp_path: Path) -> None:
    before = len(live.events("restart"))
    context = identity.client_context(Kit(tmp_path / "east"))
    raw = socket.create_connection(("127.0.0.1", live.port))
    with context.wrap_socket(raw, server_hostname=HOST) as tls:
        lengths = "Upload-Length: 1000\r\nUpload-Offset: 0\r\nContent-Length: 1000"
        tls.sendall(f"PUT /v1/start/{'a' * 64} HTTP/1.1\r\nHost: x\r\n{lengths}\r\n\r\n0123456789".encode())
        wait_until(lambda: bool(live.server._num_answering), "the beginning of the call")
        os.write(tls.fileno(), b"\x17\x03\x03\x00\x20" + b"g" * 32)
        wait_until(lambda: not live.server._num_answering, "the end of the call")
    assert len(live.events("restart")) == before
    assert not live.server._has_failed
