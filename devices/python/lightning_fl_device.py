"""A device of a lightning_fl federation: it trains with numpy and onnxruntime, without torch.

    python lightning_fl_device.py https://fl.example.org --token-file token --data shard.safetensors

The data is a safetensors file with the batch's tensors, ``0`` and ``1`` for pairs ``(x, y)``, over all examples. It
never leaves the device: what is sent is the change of the parameters, the numbers of examples and steps, and the loss.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import struct
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

PROTOCOL = 1
DTYPES = {"F32": "<f4", "F64": "<f8", "I64": "<i8", "I32": "<i4", "U8": "<u1", "BOOL": "?"}
DELTA = "delta\x1f"  # before the name of each tensor of an update

Arrays = dict[str, np.ndarray]


class Refused(Exception):
    """The gateway has refused a request.

    Args:
        status: The HTTP status.
        facts: Its answer, with ``error`` and ``kind``.
    """

    def __init__(self, status: int, facts: Mapping[str, Any]) -> None:
        super().__init__(f"{status}: {facts.get('error', 'no reason given')}")
        self.status, self.facts = status, facts


class Device:
    """Trains for a federation, task by task.

    Args:
        address: The gateway's, as ``https://fl.example.org``.
        token: What ``lightning-fl gateway --enrol`` has printed.
        data: The batch's tensors over all examples, by name.
        conditions: What holds for this device now, such as ``("charging", "unmetered")``.
        patience: For how many seconds it tries again when the gateway can't be reached.
        threads: Threads of onnxruntime. Default 1.
    """

    def __init__(
        self,
        address: str,
        token: str,
        data: Arrays,
        conditions: tuple[str, ...] = (),
        patience: float = 300.0,
        threads: int = 1,
    ) -> None:
        if len({len(own) for own in data.values()}) != 1:
            raise ValueError(
                f"The data's tensors have {[len(own) for own in data.values()]} examples; expected as many."
            )
        self.address, self.token, self.data = address.rstrip("/"), token, data
        self.conditions, self.patience, self.threads = list(conditions), patience, threads
        self._session: tuple[str, onnxruntime.InferenceSession] | None = None

    def run(self, tasks: int | None = None) -> int:
        """Trains until the federation is over, or for so many tasks; returns how many updates were taken."""
        taken = 0
        while tasks is None or taken < tasks:
            try:
                task = self.check_in()
                if task is None:
                    continue
                update, fields = self.train(task)
                self.send(task, update, fields)
            except Refused as refused:
                if refused.facts.get("kind") == "over":
                    return taken
                # Too late or too old: there is a newer task. Anything else stays refused.
                if refused.facts.get("kind") not in ("late", "stale"):
                    raise
                continue
            taken += 1
        return taken

    def check_in(self) -> dict[str, Any] | None:
        """Asks for a task; None if there is none yet."""
        body = json.dumps({"protocol": PROTOCOL, "conditions": self.conditions}).encode()
        answer = self._call("POST", "/v1/checkin", body)
        return json.loads(answer) if answer else None

    def train(self, task: Mapping[str, Any]) -> tuple[Arrays, dict[str, Any]]:
        """Trains from the task's model; returns the change of the parameters, and what is said of it."""
        session = self._step(task["step_digest"])
        start = decode(self._call("GET", f"/v1/models/{task['version']}"))
        outputs = [given.name for given in session.get_outputs()]
        feeds = {f"parameter.{name}": own for name, own in start.items()}
        for given in session.get_inputs():
            if given.name.startswith("optimizer."):
                feeds[given.name] = np.zeros(given.shape, np.float32)
        lr, num_examples = np.array(task["lr"], np.float32), len(next(iter(self.data.values())))
        steps, total, seen = 0, 0.0, 0
        for rows in batches(task, num_examples):
            batch = {f"batch.{name}": own[rows] for name, own in self.data.items()}
            found = dict(zip(outputs, session.run(None, {**feeds, **batch, "lr": lr}), strict=True))
            total, seen, steps = total + float(found.pop("loss")) * len(rows), seen + len(rows), steps + 1
            feeds = {name.removeprefix("next."): own for name, own in found.items()}
        update = {name: feeds[f"parameter.{name}"] - own for name, own in start.items()}
        said = {"version": task["version"], "num_examples": num_examples, "num_steps": steps, "loss": total / seen}
        return update, said

    def send(self, task: Mapping[str, Any], update: Arrays, fields: Mapping[str, Any]) -> None:
        """Sends an update. If the answer is lost it is sent again, and counts once."""
        body = encode({DELTA + name: own for name, own in update.items()}, fields)
        try:
            self._call("PUT", f"/v1/updates?task={task['task']}", body)
        except Refused as refused:
            is_in = refused.facts.get("digest") == hashlib.sha256(body).hexdigest()
            if not (refused.facts.get("kind") == "replay" and is_in):
                raise

    def _step(self, digest: str) -> onnxruntime.InferenceSession:
        if self._session is None or self._session[0] != digest:
            content = self._call("GET", "/v1/step")
            if hashlib.sha256(content).hexdigest() != digest:
                raise ValueError("The training step is another one than the task names.")
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = self.threads
            session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
            self._session = digest, session
        return self._session[1]

    def _call(self, method: str, path: str, body: bytes | None = None) -> bytes:
        headers = {"Authorization": f"Bearer {self.token}", "Content-Type": "application/octet-stream"}
        request = urllib.request.Request(self.address + path, body, headers, method=method)
        until, wait = time.monotonic() + self.patience, 0.1
        while True:
            try:
                with urllib.request.urlopen(request, timeout=60) as answer:
                    return answer.read()
            except urllib.error.HTTPError as error:
                refused = Refused(error.code, _facts(error.read()))
                asked = error.headers.get("Retry-After", "")
                wait = max(wait, float(asked) if asked.isdigit() else 0.0)
                if error.code not in (408, 429, 500, 502, 503, 504, 507) or time.monotonic() + wait > until:
                    raise refused from error
            except (OSError, urllib.error.URLError):  # not there, or gone before it had answered
                if time.monotonic() > until:
                    raise
            time.sleep(wait * random.uniform(1.0, 1.5))  # not all devices at once
            wait = min(2 * wait, 10.0)


def batches(task: Mapping[str, Any], num_examples: int) -> Iterator[np.ndarray]:
    """The rows of each step's batch."""
    size, steps, epoch = task["batch_size"], task["steps"], 0
    left = steps if steps is not None else -(-num_examples // size) * task["epochs"]
    while left > 0:
        rows = np.arange(num_examples)
        if task["shuffle"]:
            rows = shuffled(num_examples, f"{task['seed']}/{task['version']}/{task['device']}/{epoch}")
        for start in range(0, num_examples, size):
            if left > 0:
                yield rows[start : start + size]
                left -= 1
        epoch += 1


def shuffled(count: int, words: str) -> np.ndarray:
    """An order of ``count`` rows that depends on ``words`` only, the same in every language.

    The numbers are those of mulberry32, the order that of Fisher and Yates.
    """
    state = int.from_bytes(hashlib.sha256(words.encode()).digest()[:4], "little")
    rows = np.arange(count)
    for last in range(count - 1, 0, -1):
        state = (state + 0x6D2B79F5) & 0xFFFFFFFF
        t = (state ^ (state >> 15)) * (state | 1) & 0xFFFFFFFF
        t ^= (t + ((t ^ (t >> 7)) * (t | 61) & 0xFFFFFFFF)) & 0xFFFFFFFF
        other = (t ^ (t >> 14)) * (last + 1) >> 32
        rows[last], rows[other] = rows[other], rows[last]
    return rows


# ---- files of tensors: safetensors


def decode(content: bytes) -> Arrays:
    """The tensors of a safetensors file."""
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        start, end = (8 + size + offset for offset in entry["data_offsets"])
        found[name] = np.frombuffer(content[start:end], DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return found


def encode(tensors: Arrays, fields: Mapping[str, Any]) -> bytes:
    """float32 tensors and fields as a safetensors file."""
    header: dict[str, Any] = {"__metadata__": {"__fields__": json.dumps(dict(fields))}}
    parts, offset = [], 0
    for name, own in tensors.items():
        data = np.ascontiguousarray(own, "<f4").tobytes()
        header[name] = {"dtype": "F32", "shape": list(own.shape), "data_offsets": [offset, offset + len(data)]}
        parts.append(data)
        offset += len(data)
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    return struct.pack("<Q", len(head)) + head + b"".join(parts)


def _facts(body: bytes) -> dict[str, Any]:
    try:
        found = json.loads(body)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Trains for a federation with this device's data.")
    parser.add_argument("address", help="the gateway, as https://fl.example.org")
    parser.add_argument("--token-file", type=Path, required=True, help="a file with this device's token")
    parser.add_argument("--data", type=Path, required=True, help="a safetensors file with tensors 0, 1, ...")
    parser.add_argument("--conditions", nargs="*", default=[], help="what holds now: charging, unmetered, ...")
    parser.add_argument("--tasks", type=int, help="end after so many tasks")
    args = parser.parse_args()
    token, data = args.token_file.read_text().strip(), decode(args.data.read_bytes())
    try:
        taken = Device(args.address, token, data, tuple(args.conditions)).run(args.tasks)
    except Refused as refused:
        raise SystemExit(f"The gateway refuses this device: {refused}") from None
    print(f"{taken} updates were taken.")


if __name__ == "__main__":
    main()
