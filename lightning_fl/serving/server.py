"""An HTTP server for a trained model, on LitServe."""

# Without `from __future__ import annotations`: LitServe inspects the annotations of `decode_request`.

import asyncio
import json
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import fastapi
import litserve
import torch
from fastapi.responses import JSONResponse
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from lightning_fl.serving.export import Outputs
from lightning_fl.serving.loading import Inputs, example_inputs, load_module
from lightning_fl.serving.models import ServedModels, Version, decode
from lightning_fl.types import Tree

logger = logging.getLogger(__name__)

MAX_BYTES = 16 * 2**20
"""Maximum size of a request's body, in bytes."""
BODY_S = 30
"""Seconds within which a body must arrive, since a pending request occupies a slot."""
MAX_REQUESTS = 256
"""Maximum number of pending requests."""
ATTEMPTS = 3
"""Number of attempts to load a client's model while rounds replace it."""

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


@dataclass(frozen=True)
class PendingRequest:
    """A request after its checks.

    Args:
        inputs: The batch.
        version: The model that answers.
        tensors: Its tensors, including those of the requested client.
    """

    inputs: Inputs
    version: Version
    tensors: Tree


Decoded = PendingRequest | JSONResponse


class ModelAPI(litserve.LitAPI):
    """Answers ``POST /predict`` with the outputs of the module's ``forward``.

    The body is ``{"inputs": [[...], ...]}``, a batch of examples; the response is ``{"outputs": ..., "round": ...,
    "model": ...}``. The header ``X-Client`` requests a client's personalised model.

    Args:
        checkpoint: The checkpoint.
        class_path: The module's class, if the run does not name it.
        shape: Shape of one example, if it can't be found from the run.
        serves_clients: Whether requests with ``X-Client`` are answered. Default False.
        watches: Whether to reload the checkpoint when its file is replaced. Default False.
        canary: Another checkpoint, which answers a share of the requests. None: there is none.
        share: The canary's share of the requests, from 0 to 1. Default 0.
        base: A file with the frozen parameters, if the checkpoint was written without them.
        max_batch_size: Maximum number of requests that are computed together. Default 8.
        wait: Seconds to wait for further requests of a batch. Default 0.005.
    """

    def __init__(
        self,
        checkpoint: Path,
        class_path: str | None = None,
        shape: tuple[int, ...] | None = None,
        serves_clients: bool = False,
        watches: bool = False,
        canary: Path | None = None,
        share: float = 0.0,
        base: Path | None = None,
        max_batch_size: int = 8,
        wait: float = 0.005,
    ) -> None:
        super().__init__(max_batch_size=max_batch_size, batch_timeout=wait)
        self.checkpoint = checkpoint
        self.class_path = class_path
        self.shape = shape
        self.serves_clients = serves_clients
        self.watches = watches
        self.canary_checkpoint = canary
        self.share = share
        self.base = base

    def setup(self, device: Any) -> None:
        """Loads the model in the worker's process."""
        end_with_parent()
        torch.set_num_threads(1)  # one core per worker
        module = load_module(self.checkpoint, self.class_path, base=self.base)
        examples = example_inputs(module, self.checkpoint, self.shape)
        self.shapes = [tuple(one.shape[1:]) for one in examples]
        self.dtypes = [one.dtype for one in examples]
        self.models = ServedModels(module.to(device), self.checkpoint, self.canary_checkpoint, self.share)
        if self.watches:
            self.models.watch()

    # LitServe answers all requests of a batch with the exception of one, so errors are returned here, not raised.

    def decode_request(self, request: fastapi.Request) -> Decoded:
        """The checked request, or the error response."""
        body = cast(dict[str, Any], request)  # LitServe passes the parsed JSON
        client = body.get("client")
        if client is not None and not self.serves_clients:
            return _refusal(400, "This server answers for the global model only; start it with --clients for X-Client.")
        try:
            inputs = decode(body.get("inputs"), self.shapes, self.dtypes)
        except ValueError as error:
            return _refusal(400, str(error))
        for _ in range(ATTEMPTS):
            version = self.models.choose(body.get("request_id"))
            try:
                return PendingRequest(inputs, version, version.tensors(client))
            except ValueError:
                break
            except OSError:  # training continued and deleted files that no checkpoint needs any more
                if not self.watches:
                    detail = f"Round {version.round} was replaced, including its clients' models; serve with --watch."
                    return _refusal(410, detail)
                self.models.refresh()
        return _refusal(404, f"There is no model of client {client!r}.")

    def batch(self, inputs: list[Decoded]) -> list[Decoded]:
        """Keeps the requests separate; :meth:`predict` batches those for the same model."""
        return inputs

    def predict(self, requests: list[Decoded]) -> list[Any]:
        """The responses, one per request."""
        groups: dict[int, list[int]] = defaultdict(list)
        for place, request in enumerate(requests):
            if isinstance(request, PendingRequest):
                groups[id(request.tensors)].append(place)
        answers: list[Any] = list(requests)
        for places in groups.values():
            same = [request for place in places if isinstance(request := requests[place], PendingRequest)]
            first = same[0]
            joined = tuple(torch.cat(parts) for parts in zip(*(request.inputs for request in same), strict=True))
            try:
                outputs = self.models.compute(first.tensors, joined)
            # A module may raise any exception, for example for an unknown token.
            except Exception as error:
                for place in places:  # one by one, so that only the invalid request gets the error
                    answers[place] = self._failed(error) if len(same) == 1 else self.predict([requests[place]])[0]
                continue
            sizes = [len(request.inputs[0]) for request in same]
            parts = [output.split(sizes) for output in outputs]
            for index, place in enumerate(places):
                answers[place] = (tuple(part[index] for part in parts), first.version)
        return answers

    def _failed(self, error: Exception) -> JSONResponse:
        logger.warning("The model can't compute a request: %s: %s", type(error).__name__, error)
        return _refusal(422, "The model can't process these inputs; see the server's log.")

    def unbatch(self, output: list[Any]) -> list[Any]:
        """The responses."""
        return output

    def encode_response(self, output: JSONResponse | tuple[Outputs, Version]) -> Any:
        """The response as JSON."""
        if isinstance(output, JSONResponse):
            return output
        tensors, version = output
        lists = [one.tolist() for one in tensors]
        return {
            "outputs": lists[0] if len(lists) == 1 else lists,
            "round": version.round,
            "model": version.digest,
        }


def _refusal(status: int, detail: str) -> JSONResponse:
    return JSONResponse({"detail": detail}, status_code=status)


class Gate:
    """Refuses requests that are not JSON, copies the headers that choose a model into the body, and serves metrics.

    LitServe passes only the body to a worker. The metrics are at ``GET /metrics``.

    Args:
        app: The application behind it.
        max_requests: Maximum number of pending requests; further ones get status 503.
    """

    def __init__(
        self, app: Callable[[Scope, Receive, Send], Awaitable[None]], max_requests: int = MAX_REQUESTS
    ) -> None:
        self.app = app
        self.max_requests = max_requests
        self.num_waiting = 0
        self.registry = CollectorRegistry()
        self.requests = Counter("lightning_fl_requests", "Responses by status.", ["status"], registry=self.registry)
        self.seconds = Histogram("lightning_fl_request_seconds", "Seconds per response.", registry=self.registry)
        end_with_parent()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handles one request."""
        if scope["type"] == "http" and scope["path"] == "/metrics":
            await _answer(send, 200, generate_latest(self.registry), b"text/plain; version=0.0.4")
            return
        if scope["type"] != "http" or scope["path"] != "/predict":
            await self.app(scope, receive, send)
            return
        start = time.perf_counter()

        async def counted(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                self.requests.labels(message["status"]).inc()
                self.seconds.observe(time.perf_counter() - start)
            await send(message)

        if self.num_waiting >= self.max_requests:
            detail = b'{"detail": "Too many requests wait already; come again in a second."}'
            await _answer(counted, 503, detail, b"application/json", (b"retry-after", b"1"))
            return
        self.num_waiting += 1
        try:
            await self._pass_on(scope, receive, counted)
        finally:
            self.num_waiting -= 1

    async def _pass_on(self, scope: Scope, receive: Receive, counted: Send) -> None:
        try:
            body = await asyncio.wait_for(_read_body(receive), BODY_S)
        except asyncio.TimeoutError:
            detail = b'{"detail": "The body took longer than %d seconds."}' % BODY_S
            await _answer(counted, 408, detail, b"application/json")
            return
        if body is None:
            return
        if len(body) > MAX_BYTES:
            detail = b'{"detail": "The body has more than %d bytes."}' % MAX_BYTES
            await _answer(counted, 413, detail, b"application/json")
            return
        try:
            given = json.loads(body)
        except (ValueError, RecursionError):
            given = None
        if not isinstance(given, dict) and scope["method"] == "POST":
            await _answer(
                counted, 400, b'{"detail": "Expected a JSON object {\\"inputs\\": ...}."}', b"application/json"
            )
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        chosen = {"client": headers.get("x-client"), "request_id": headers.get("x-request-id")}
        replaced = json.dumps({"inputs": (given or {}).get("inputs"), **chosen}).encode()
        of_body = {b"content-type": b"application/json", b"content-length": b"%d" % len(replaced)}
        kept = [
            (name, value) for name, value in scope["headers"] if name.lower() not in (*of_body, b"transfer-encoding")
        ]
        scope = {**scope, "headers": [*kept, *of_body.items()]}
        parts = iter([{"type": "http.request", "body": replaced, "more_body": False}])

        async def replay() -> MutableMapping[str, Any]:
            return next(parts, None) or await receive()

        await self.app(scope, replay, counted)


async def _read_body(receive: Receive) -> bytes | None:
    """The body of a request, or its beginning if it is too large; None if the client has disconnected."""
    body = b""
    while len(body) <= MAX_BYTES:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    return body


async def _answer(send: Send, status: int, body: bytes, content_type: bytes, *more: tuple[bytes, bytes]) -> None:
    headers = [(b"content-type", content_type), (b"content-length", b"%d" % len(body)), *more]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def end_with_parent() -> None:
    """Ends this process soon after its parent has ended, because a server that is killed can't stop its workers."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def serve(
    api: ModelAPI,
    host: str = "127.0.0.1",
    port: int = 8000,
    num_workers: int = 1,
    max_requests: int = MAX_REQUESTS,
) -> None:
    """Answers requests until SIGINT or SIGTERM.

    Args:
        api: The API that answers requests.
        host: The address to listen on; 0.0.0.0 for all. Default 127.0.0.1.
        port: The port, from 1024. Default 8000.
        num_workers: Number of worker processes. Default 1.
        max_requests: Maximum number of pending requests.
    """
    server_process = os.getpid()

    def stop(signum: int, frame: Any) -> None:
        if os.getpid() != server_process:  # LitServe forks its HTTP process, which inherits this handler
            os.kill(os.getpid(), signal.SIGKILL)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    server = litserve.LitServer(
        api, accelerator="auto", workers_per_device=num_workers, middlewares=[(Gate, {"max_requests": max_requests})]
    )
    try:
        server.run(host=host, port=port, num_api_servers=1, generate_client_file=False, log_level="warning")
    except KeyboardInterrupt:  # before LitServe itself waits for it
        for child in multiprocessing.active_children():
            child.kill()
