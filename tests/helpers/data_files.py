"""Small data files, written from the descriptions of their formats."""

from __future__ import annotations

import gzip
import http.server
import io
import struct
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np


def idx_bytes(values: np.ndarray) -> bytes:
    """An IDX file: two zero bytes, type 8, the number of axes, each axis as a 4-byte big-endian number, the values."""
    return struct.pack(f">4B{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + values.astype(np.uint8).tobytes()


def write_mnist(folder: Path, num_train: int = 60, num_test: int = 20, zipped: bool = True) -> np.ndarray:
    """The four files of MNIST with random images whose first pixel is their label; gives the training images."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for prefix, number in (("t10k", num_test), ("train", num_train)):
        images = rng.integers(0, 256, (number, 28, 28), dtype=np.uint8)
        labels = np.arange(number) % 10
        images[:, 0, 0] = labels
        for name, values in ((f"{prefix}-images-idx3-ubyte", images), (f"{prefix}-labels-idx1-ubyte", labels)):
            data = idx_bytes(values)
            (folder / f"{name}{'.gz' if zipped else ''}").write_bytes(gzip.compress(data) if zipped else data)
    return images


def cifar_archive(inside: str, files: dict[str, list[tuple[bytes, bytes]]]) -> bytes:
    """A ``.tar.gz`` of CIFAR's binary version: records of label bytes, then 1,024 red, green and blue bytes each."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        for name, records in files.items():
            content = b"".join(label + pixels for label, pixels in records)
            entry = tarfile.TarInfo(f"{inside}/{name}")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return archive.getvalue()


class Server:
    """What a test's web server gives, and how it misbehaves."""

    def __init__(self) -> None:
        self.url = ""
        self.files: dict[str, bytes] = {}
        self.requests: list[tuple[str, str | None]] = []
        self.ranges = True
        self.break_after: int | None = None
        """Bytes after which the next connection breaks."""


@contextmanager
def serve() -> Iterator[Server]:
    """A web server on the loopback interface."""
    state = Server()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name, wanted = self.path.strip("/"), self.headers.get("Range")
            state.requests.append((name, wanted))
            if name not in state.files:
                self.send_error(404)
                return
            start = int(wanted[6:-1]) if wanted and state.ranges else 0
            content = state.files[name]
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            stop, state.break_after = state.break_after, None
            self.wfile.write(content[start : None if stop is None else start + stop])

        def log_message(self, *words: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
