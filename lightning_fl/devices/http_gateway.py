"""The gateway's HTTP server: it knows which device speaks, takes bytes in and leaves the rest to the gateway."""

from __future__ import annotations

import asyncio
import itertools
import logging
import ssl
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from aiohttp import web

from lightning_fl.coordinator.refused import Refused, json_object
from lightning_fl.coordinator.wire import sha256
from lightning_fl.devices.config import LOOPBACK
from lightning_fl.devices.gateway import Gateway

HOLD_S = 20.0
"""How long a check-in is held while there is no task."""
IDLE_S = 30.0
"""A body, or an answer, that does not go on for so long is given up."""
HEADER_S = 10.0
"""A connection on which no whole request has come by then is closed."""
REQUESTS = 4
"""Requests of a device at the same time; each may keep a piece of a file in memory."""
MAX_JSON_BYTES = 1 << 16
PIECE = 1 << 18
DISK_S = 1.0
"""How long the gateway waits when it could not write, before it reads its folder again."""
DEVICE = web.RequestKey("device", str)
T = TypeVar("T")
log = logging.getLogger("lightning_fl.devices")


class HttpGateway:
    """Serves a gateway.

    Args:
        gateway: What is served.
        pages: A folder with a web page that trains, served at ``/``. None: none.
    """

    def __init__(self, gateway: Gateway, pages: Path | None = None) -> None:
        self.gateway, self.pages = gateway, pages
        self._step = gateway.plan.step.read_bytes()
        self._step_digest = sha256(gateway.plan.step)
        self._requests: Counter[str] = Counter()
        self._numbers = itertools.count()
        self._uploading: dict[str, int] = {}
        self._spoken: set[Any] = set()
        self._watchers: list[asyncio.Task[None]] = []
        self._runners: list[web.AppRunner] = []
        self._changed = asyncio.Event()
        # One thread for all that changes the folder: updates are taken in one after the other.
        self._worker = ThreadPoolExecutor(1)

    async def start(
        self, host: str | None, port: int, admin_port: int | None = None, context: ssl.SSLContext | None = None
    ) -> int:
        """Begins to serve; returns the port.

        Args:
            host: The address to listen on. None: all.
            port: The port; 0 for any.
            admin_port: A port on 127.0.0.1 for health, status and metrics. None: none.
            context: Key and certificate. None: without TLS.

        Raises:
            ValueError: If others could listen to what travels.
        """
        if context is None and host not in LOOPBACK:
            raise ValueError(f"host is {host!r}, but without a certificate a gateway is served on this machine only.")
        app = web.Application(middlewares=[self._answer], client_max_size=MAX_JSON_BYTES)
        app.router.add_post("/v1/checkin", self._check_in)
        app.router.add_get("/v1/step", self._get_step)
        app.router.add_get("/v1/models/{version}", self._get_model)
        app.router.add_put("/v1/updates", self._put)
        if self.pages is not None:
            app.on_response_prepare.append(_protect)
            app.router.add_get("/", self._index)
            app.router.add_static("/", self.pages)
        if admin_port is not None:
            admin = web.Application()
            admin.router.add_get("/health", self._status)
            admin.router.add_get("/status", self._status)
            admin.router.add_get("/metrics", self._metrics)
            await self._listen(admin, "127.0.0.1", admin_port, None)
        return await self._listen(app, host, port, context)

    async def _listen(self, app: web.Application, host: Any, port: int, context: ssl.SSLContext | None) -> int:
        runner = web.AppRunner(app, access_log=None, keepalive_timeout=75.0, shutdown_timeout=1.0)
        await runner.setup()
        self._runners.append(runner)
        await web.TCPSite(runner, host, port, ssl_context=context).start()
        self._watchers.append(asyncio.create_task(self._close_silent(runner)))
        return int(runner.addresses[0][1])

    async def _close_silent(self, runner: web.AppRunner) -> None:
        since: dict[Any, float] = {}
        while runner.server is not None:
            now, connections = time.monotonic(), set(runner.server.connections)
            self._spoken &= connections
            since = {own: since.get(own, now) for own in connections - self._spoken}
            for own, at in since.items():
                if now - at >= HEADER_S:
                    own.force_close()
            await asyncio.sleep(HEADER_S / 10)

    async def stop(self) -> None:
        """Ends all connections."""
        for watcher in self._watchers:
            watcher.cancel()
        for runner in self._runners:
            await runner.cleanup()
        self._worker.shutdown(wait=True, cancel_futures=True)

    async def _in_thread(self, function: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._worker, function, *args)

    # ---- who speaks

    @web.middleware
    async def _answer(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        self._spoken.add(request.protocol)
        try:
            if not request.path.startswith("/v1/"):
                return await handler(request)
            device = request[DEVICE] = self.gateway.who(request.headers.get("Authorization", ""), time.monotonic())
            if self._requests[device] >= REQUESTS:
                raise Refused(429, f"More than {REQUESTS} requests at a time.", kind="quota", retry_after=1)
            self._requests[device] += 1
            try:
                return await handler(request)
            finally:
                self._requests[device] -= 1
        except Refused as refused:
            return self._refuse(request, refused)
        except web.HTTPException as error:  # no such path or method
            if error.status < 400:
                raise
            kind = "oversized" if error.status == 413 else "malformed"
            return self._refuse(request, Refused(error.status, error.reason, kind=kind))
        except web.RequestPayloadError as error:
            return self._refuse(request, Refused(400, f"The body can't be read: {error}", kind="malformed"))
        except Gone:  # nobody reads the answer
            return web.Response(status=408)
        except OSError as error:
            if request.path.startswith("/v1/"):  # devices try again
                return web.json_response({"error": f"The gateway can't read: {error.strerror}."}, status=503)
            # A page's name that no file can have.
            return self._refuse(request, Refused(404, "Not Found", kind="malformed"))

    def _refuse(self, request: web.Request, refused: Refused) -> web.Response:
        self.gateway.refuse(request.get(DEVICE), refused)
        headers = {"Retry-After": str(refused.facts["retry_after"])} if "retry_after" in refused.facts else None
        return web.json_response(refused.facts, status=refused.status, headers=headers)

    def _read_folder_again(self) -> None:
        while True:  # as after a crash: what the folder says counts, and nothing else
            try:
                self.gateway.load()
                return
            except OSError:
                time.sleep(DISK_S)

    # ---- calls

    async def _check_in(self, request: web.Request) -> web.StreamResponse:
        content = json_object(await _in_time(request.read()), kind="malformed")
        until = time.monotonic() + HOLD_S
        while True:
            changed = self._changed  # before the look, so that no round that closes meanwhile is missed
            task = self.gateway.check_in(request[DEVICE], content)
            if task is not None:
                return web.json_response({**task, "step_digest": self._step_digest})
            left = until - time.monotonic()
            if left <= 0:
                return web.Response(status=204)
            try:
                await asyncio.wait_for(changed.wait(), left)
            except (TimeoutError, asyncio.TimeoutError):
                return web.Response(status=204)

    async def _get_step(self, request: web.Request) -> web.StreamResponse:
        return await _send(request, self._step)

    async def _get_model(self, request: web.Request) -> web.StreamResponse:
        version = request.match_info["version"]
        body = self.gateway.downloads.get(int(version)) if _is_number(version) else None
        if body is None:
            raise Refused(410, f"There is no model {version[:20]!r} any more.", kind="late")
        return await _send(request, body)

    async def _put(self, request: web.Request) -> web.StreamResponse:
        device, gateway = request[DEVICE], self.gateway
        # A device whose connection has broken sends again before the gateway knows: what comes later counts.
        number = self._uploading[device] = next(self._numbers)
        path: Path | None = None
        try:
            path = gateway.arriving(device).with_name(str(number))
            await self._save(request, path, number)
            before = gateway.round
            answer = await self._in_thread(gateway.receive, device, request.query.get("task", ""), path)
            if gateway.round != before or gateway.schedule.concurrency is not None:  # there may be a task now
                self._changed.set()
                self._changed = asyncio.Event()
        except OSError as error:  # of the disk; what the network raises is `Gone` or `Refused`
            log.error("The gateway can't write: %s; devices try again.", error)
            await self._in_thread(self._read_folder_again)
            return web.json_response({"error": f"The gateway can't write: {error.strerror}."}, status=507)
        finally:
            if path is not None:
                path.unlink(missing_ok=True)
            if self._uploading.get(device) == number:
                del self._uploading[device]
        return web.json_response(answer)

    async def _save(self, request: web.Request, path: Path, number: int) -> None:
        limit, until = self.gateway.max_bytes(), time.monotonic() + self.gateway.admission.rules.task_s
        with path.open("wb") as file:
            if (request.content_length or 0) > limit:
                raise Refused(413, f"The update has {request.content_length} bytes, at most {limit} are taken.", **BIG)
            while piece := await _in_time(request.content.read(PIECE), min(IDLE_S, until - time.monotonic())):
                if self._uploading.get(request[DEVICE]) != number:
                    raise Refused(429, "Another update of this device is coming.", kind="quota", retry_after=1)
                if file.tell() + len(piece) > limit:
                    raise Refused(413, f"The update has more than {limit} bytes.", **BIG)
                file.write(piece)

    async def _index(self, request: web.Request) -> web.StreamResponse:
        assert self.pages is not None
        return web.FileResponse(self.pages / "index.html")

    # ---- for the people who run it

    async def _status(self, request: web.Request) -> web.StreamResponse:
        return web.json_response(self.gateway.status())

    def metrics(self) -> str:
        """What Prometheus reads."""
        status = self.gateway.status()
        gauges = ("round", "devices", "training", "arrived", "wanted")
        lines = [f"# TYPE lightning_fl_{name} gauge\nlightning_fl_{name} {status[name]}" for name in gauges]
        accepted = "lightning_fl_updates_accepted_total"
        lines += [f"# TYPE {accepted} counter\n{accepted} {status['accepted']}"]
        lines += ["# TYPE lightning_fl_refused_total counter"]
        lines += [f'lightning_fl_refused_total{{reason="{k}"}} {n}' for k, n in sorted(status["refused"].items())]
        return "\n".join(lines) + "\n"

    async def _metrics(self, request: web.Request) -> web.StreamResponse:
        return web.Response(text=self.metrics(), headers={"Content-Type": "text/plain; version=0.0.4"})


# The page holds a token: nothing from elsewhere runs in it, and no other page shows it.
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; script-src 'self' 'wasm-unsafe-eval'; style-src 'unsafe-inline'; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


async def _protect(request: web.Request, response: web.StreamResponse) -> None:
    response.headers.update(PAGE_HEADERS)


BIG = {"kind": "oversized"}


class Gone(Exception):
    """The connection of a device has broken."""


async def _in_time(awaited: Awaitable[T], seconds: float | None = None) -> T:
    try:
        return await asyncio.wait_for(awaited, IDLE_S if seconds is None else seconds)
    except (TimeoutError, asyncio.TimeoutError) as error:
        raise Refused(408, "The device was too slow.", kind="late") from error
    except OSError as error:  # among them `ssl.SSLError`
        raise Gone from error


async def _send(request: web.Request, body: bytes) -> web.StreamResponse:
    """Answers piece by piece, so that a device which reads slowly keeps no copy of the file in memory."""
    response = web.StreamResponse(headers={"Content-Type": "application/octet-stream"})
    response.content_length = len(body)
    await response.prepare(request)
    try:
        for start in range(0, len(body), PIECE):
            await _in_time(response.write(memoryview(body)[start : start + PIECE]))
    except Refused as error:
        assert request.transport is not None
        request.transport.abort()  # half an answer can't be taken back
        raise Gone from error
    return response


def _is_number(word: str) -> bool:
    return word.isascii() and word.isdigit() and len(word) < 10
