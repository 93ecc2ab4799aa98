"""The coordinator's HTTPS server: it knows who speaks, takes bytes in and leaves the rest to the service."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import ssl
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakSet

from aiohttp import web

from lightning_fl.coordinator import identity
from lightning_fl.coordinator.identity import IdentityError, Kit
from lightning_fl.coordinator.meetings import Meetings
from lightning_fl.coordinator.refused import Refused, integer, json_object
from lightning_fl.coordinator.service import PROTOCOL, START, Coordinator
from lightning_fl.coordinator.store import Upload

T = TypeVar("T")
HOLD_S = 20.0
"""How long a call is held that waits for something to happen."""
IDLE_S = 30.0
"""A body that does not go on for so long is ended; the silo resumes it."""
TICK_S = 0.05
ENDING_S = 1.0
"""How long calls that are being answered may go on when the server ends."""
DISK_S = 1.0
"""How long the coordinator waits when it could not write, before it tries again."""
SAID_S = 60.0
"""How long a handshake that fails for the same reason as another is not written down."""
MAX_JSON_BYTES = 1 << 24
PIECE = 1 << 20
log = logging.getLogger("lightning_fl.coordinator")
SILO = web.RequestKey("silo", str)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class HttpServer:
    """Serves a coordinator.

    Args:
        coordinator: What is served.
        kit: The coordinator's key and certificate, and the authority whose silos may come.
    """

    def __init__(self, coordinator: Coordinator, kit: Kit) -> None:
        self.coordinator = coordinator
        self.kit = kit
        rules = coordinator.rules
        self.meetings = Meetings(rules.silos, rules.evaluation_s, coordinator.audit)
        self._context: ssl.SSLContext | None = None
        self._kit_version = kit.version()
        self._revoked = kit.revoked()
        self._has_failed = False
        self._writers: dict[Path, object] = {}
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._runners: list[web.AppRunner] = []
        # One thread for all that reads whole updates, so that no two of them are in memory at once.
        self._worker = ThreadPoolExecutor(1)
        # One for all that is sent, since each thread keeps memory of its own for the pieces.
        self._reader = ThreadPoolExecutor(1)
        self._transports: WeakSet[asyncio.WriteTransport] = WeakSet()
        self._taken_in: set[Path] = set()
        self._num_answering = 0
        self._failures: dict[str, float] = {}
        """When a handshake that has failed was written down last, by the reason, one of OpenSSL's."""
        self._is_ending = False

    async def start(self, host: str | list[str] | None, port: int, admin_port: int | None = None) -> int:
        """Begins to serve; returns the port.

        Args:
            host: Addresses to listen on. None: all, of IPv4 and IPv6.
            port: The port; 0 for any.
            admin_port: A port on 127.0.0.1 for health and metrics, without TLS. None: none.
        """
        app = web.Application(middlewares=[self._answer], client_max_size=MAX_JSON_BYTES)
        app.router.add_get("/v1/check", self._check)
        app.router.add_post("/v1/join", self._join)
        app.router.add_get("/v1/rounds", self._rounds)
        app.router.add_get("/v1/states/{digest}", self._state)
        app.router.add_get("/v1/rounds/{round}/{topic}", self._outcome)
        for path in ("/v1/rounds/{round}/{topic}/{digest}", "/v1/start/{digest}"):
            app.router.add_head(path, self._offset)
            app.router.add_put(path, self._put)
        app.router.add_post("/v1/meeting", self._come)
        app.router.add_post("/v1/meeting/leave", self._leave_meeting)
        app.router.add_put("/v1/meeting/{meeting}/{step}", self._tell)
        app.router.add_get("/v1/meeting/{meeting}/{step}", self._told)
        app.router.add_post("/v1/alive", self._alive)
        app.router.add_post("/v1/leave", self._leave)
        self._context = identity.server_context(self.kit, self._handshake_failed)
        if admin_port is not None:
            admin = web.Application()
            admin.router.add_get("/health", self._health)
            admin.router.add_get("/status", self._status)
            admin.router.add_get("/metrics", self._metrics)
            await self._listen(admin, "127.0.0.1", admin_port, None)
        return await self._listen(app, host, port, self._context)

    async def _listen(self, app: web.Application, host: Any, port: int, context: ssl.SSLContext | None) -> int:
        runner = web.AppRunner(app, access_log=None, keepalive_timeout=120.0, shutdown_timeout=1.0)
        await runner.setup()
        self._runners.append(runner)
        await web.TCPSite(runner, host, port, ssl_context=context, backlog=512).start()
        return int(runner.addresses[0][1])

    async def run(self) -> None:
        """Does what is due, until the federation is over and everybody has been told, or it is cancelled."""
        while True:
            try:
                if self._has_failed:  # as after a crash: what the folder says counts, and nothing else
                    await asyncio.sleep(DISK_S)
                    self.coordinator.load(time.monotonic())
                    self._has_failed = False
                if self.coordinator.step(time.monotonic()):
                    self.coordinator.begin_close()
                    # In a thread: to add up large updates takes seconds, in which silos must still get answers.
                    await self._in_thread(self.coordinator.close)
                self.meetings.step(time.monotonic())
                self._read_kit_again()
            except OSError as error:  # the disk is full, say: silos try on meanwhile
                self._can_not_write(error)
            await asyncio.sleep(TICK_S)

    async def stop(self) -> None:
        """Ends all connections."""
        self._is_ending = True
        self._worker.shutdown(wait=False, cancel_futures=True)
        for site in [site for runner in self._runners for site in runner.sites]:
            await site.stop()
        until = time.monotonic() + ENDING_S
        while self._num_answering and time.monotonic() < until:
            await asyncio.sleep(TICK_S)
        # TLS would wait for the other sides' farewells. Before aiohttp closes the connections: one that has been closed
        # twice can't be aborted.
        for transport in list(self._transports):
            transport.abort()
        await asyncio.sleep(0.01)
        for runner in self._runners:
            await runner.cleanup()
        self._reader.shutdown(wait=False, cancel_futures=True)  # last, because what is being answered needs it

    async def _in_thread(self, function: Callable[..., None], *args: Any) -> None:
        await asyncio.get_running_loop().run_in_executor(self._worker, function, *args)

    async def _hold(self, ask: Callable[[], T | None]) -> T | None:
        """Asks again and again until there is an answer, or the call has been held for long enough."""
        until = time.monotonic() + HOLD_S
        while (answer := ask()) is None and time.monotonic() < until and not self._is_ending:
            await asyncio.sleep(TICK_S)
        return answer

    def _can_not_write(self, error: OSError) -> None:
        log.error("The coordinator can't write: %s; it tries again.", error)
        self._has_failed = True

    def _read_kit_again(self) -> None:
        version = self.kit.version()
        if version == self._kit_version:
            return
        try:
            assert self._context is not None
            identity.load(self._context, self.kit)
            self._revoked = self.kit.revoked()
        except (OSError, ValueError) as error:  # half of the files are new: the next look finds them all
            log.warning("The kit can't be read: %s", error)
            return
        self._kit_version = version
        self.coordinator.audit.append("kit read again")

    # ---- who speaks

    @web.middleware
    async def _answer(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        # From the connection itself, and at each request: a certificate may be revoked or end meanwhile.
        peer = None
        if request.transport is not None:
            self._transports.add(request.transport)
            peer = request.transport.get_extra_info("ssl_object")
        try:
            name = identity.peer_name(None if peer is None else peer.getpeercert(True), self.kit, self._revoked)
        except (IdentityError, ValueError) as error:
            return self._refuse(request, Refused(403, f"{request.remote} is refused: {error}."))
        if name not in self.coordinator.rules.silos:
            return self._refuse(request, Refused(403, f"{name!r} is not among the silos of federation.yaml."))
        request[SILO] = name
        self._num_answering += 1
        try:
            return await handler(request)
        except Refused as refused:
            return self._refuse(request, refused)
        except (TimeoutError, asyncio.TimeoutError):
            return self._refuse(request, Refused(408, f"The body did not go on for {IDLE_S:g} s."))
        except web.HTTPException as error:  # no such path or method, or a body that is too large
            return self._refuse(request, Refused(error.status, error.reason))
        except (ConnectionError, ssl.SSLError):  # the silo has gone, or its TLS has broken: nobody reads the answer
            return web.Response(status=408)
        except OSError as error:
            self._can_not_write(error)
            return web.json_response({"error": f"The coordinator can't write: {error.strerror}."}, status=507)
        finally:
            self._num_answering -= 1

    def _refuse(self, request: web.Request, refused: Refused) -> web.Response:
        quiet = refused.status in (409, 410)  # what a silo meets that comes late or resumes
        if not quiet:
            who = request.get(SILO) or request.remote
            self.coordinator.audit.append("refused", silo=who, call=request.path[:200], reason=str(refused)[:500])
        return web.json_response(refused.facts, status=refused.status)

    def _handshake_failed(self, reason: str) -> None:
        # Anybody can fail: a line for each would fill the disk, and the silos would wait while it is written.
        now = time.monotonic()
        if now - self._failures.get(reason, -math.inf) >= SAID_S:
            self._failures[reason] = now
            self.coordinator.audit.append("connection refused", reason=reason)

    # ---- calls

    async def _check(self, request: web.Request) -> web.StreamResponse:
        return web.json_response({"service": "lightning_fl", "silo": request[SILO]})

    async def _join(self, request: web.Request) -> web.StreamResponse:
        answer = self.coordinator.join(request[SILO], await _json(request), time.monotonic())
        return web.json_response({**answer, "time": time.time()})

    async def _rounds(self, request: web.Request) -> web.StreamResponse:
        after = integer(request.query.get("after", ""), minimum=-1)
        opening = await self._hold(lambda: self.coordinator.next_round(request[SILO], after, time.monotonic()))
        return _bytes(None if opening is None else opening.encode())

    async def _state(self, request: web.Request) -> web.StreamResponse:
        digest = request.match_info["digest"]
        if not self.coordinator.may_read(digest):
            raise Refused(404, "There is no such state.")
        return await self._send(request, self.coordinator.store.state_path(digest))

    async def _outcome(self, request: web.Request) -> web.StreamResponse:
        round, topic = integer(request.match_info["round"]), request.match_info["topic"]
        path = await self._hold(lambda: self.coordinator.outcome(round, topic, request[SILO]))
        return web.Response(status=204) if path is None else await self._send(request, path)

    async def _send(self, request: web.Request, path: Path) -> web.StreamResponse:
        """Sends a file, or what of it follows on what the silo has.

        aiohttp's own ``FileResponse`` sends pieces of 32 KiB over TLS, which takes three times as long.
        """
        try:
            file = path.open("rb")
        except FileNotFoundError as error:
            raise Refused(404, "There is no such file any more.") from error
        with file:
            size = os.fstat(file.fileno()).st_size
            try:
                start = request.http_range.start or 0
            except ValueError as error:
                raise Refused(400, "The range can't be read.") from error
            if start and not 0 <= start < size:
                raise Refused(416, f"The file has {size} bytes.")
            response = web.StreamResponse(status=206 if start else 200)
            response.content_type, response.content_length = "application/octet-stream", size - start
            if start:
                response.headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
            await response.prepare(request)
            file.seek(start)
            loop = asyncio.get_running_loop()
            while piece := await loop.run_in_executor(self._reader, file.read, PIECE):
                await response.write(piece)
            await response.write_eof()
        return response

    async def _offset(self, request: web.Request) -> web.StreamResponse:
        upload = self.coordinator.target(request[SILO], *_place(request), length=1)
        size = upload.ok.stat().st_size if upload.ok.exists() else upload.size
        return web.Response(headers={"Upload-Offset": str(size), "Upload-Complete": str(int(upload.ok.exists()))})

    async def _put(self, request: web.Request) -> web.StreamResponse:
        coordinator, silo = self.coordinator, request[SILO]
        round, topic, digest = _place(request)
        length = integer(request.headers.get("Upload-Length", ""), minimum=1)
        offset = integer(request.headers.get("Upload-Offset", ""))
        upload = coordinator.target(silo, round, topic, digest, length)
        if upload.ok.exists():  # the answer to an earlier call was lost
            return web.json_response({"complete": True})
        # A connection that takes over ends the one before, which may be half open.
        mine = self._writers[upload.part] = object()
        if offset != upload.size:
            raise Refused(409, f"The file has {upload.size} bytes here.", offset=upload.size)
        with upload.part.open("ab") as file:
            while piece := await in_time(request.content.read(PIECE)):
                if self._writers.get(upload.part) is not mine or upload.part in self._taken_in:
                    raise Refused(409, "Another connection has taken over.", offset=upload.size)
                if file.tell() + len(piece) > length:
                    raise Refused(413, f"Silo {silo!r} sends more than the {length} bytes that it announced.")
                file.write(piece)
                file.flush()
                coordinator.progressed(silo, time.monotonic())
        if upload.size < length:
            return web.json_response({"complete": False, "offset": upload.size})
        # A call that its silo has given up may still be here when the silo repeats it.
        async with self._locks[silo]:
            upload = coordinator.target(silo, round, topic, digest, length)
            if not upload.ok.exists():
                await self._take_in(upload, round, topic)
        return web.json_response({"complete": True})

    async def _take_in(self, upload: Upload, round: int | None, topic: str) -> None:
        coordinator = self.coordinator
        # What counts is what was checked: until it is accepted, nobody adds to it.
        self._taken_in.add(upload.part)
        try:
            await self._in_thread(coordinator.check, upload, topic)
            while coordinator.is_busy(topic):
                await asyncio.sleep(TICK_S)
        except Refused as refused:
            coordinator.refuse(upload, topic, str(refused))
            raise
        else:
            coordinator.accept(upload, round, topic, time.monotonic())
        finally:
            self._writers.pop(upload.part, None)
            self._taken_in.discard(upload.part)

    async def _alive(self, request: web.Request) -> web.StreamResponse:
        return web.json_response({"round": self.coordinator.alive(request[SILO], time.monotonic())})

    async def _leave(self, request: web.Request) -> web.StreamResponse:
        self.coordinator.leave(request[SILO], str((await _json(request)).get("reason", "")))
        return web.json_response({})

    # ---- meetings

    async def _come(self, request: web.Request) -> web.StreamResponse:
        silo, content = request[SILO], await _json(request)
        if content.get("protocol") != PROTOCOL:
            raise Refused(422, f"Silo {silo!r} speaks another protocol: install the same version of lightning_fl.")

        def come() -> dict[str, Any]:
            return self.meetings.come(silo, content.get("token"), time.monotonic())

        met = await self._hold(lambda: found if (found := come())["meeting"] is not None else None)
        return web.json_response(met or come())

    async def _tell(self, request: web.Request) -> web.StreamResponse:
        place = request[SILO], request.match_info["meeting"], integer(request.match_info["step"])
        data = await in_time(request.read())
        self.meetings.put(*place, request.query.get("kind", ""), data, time.monotonic())
        return web.json_response({})

    async def _told(self, request: web.Request) -> web.StreamResponse:
        place = request[SILO], request.match_info["meeting"], integer(request.match_info["step"])
        return _bytes(await self._hold(lambda: self.meetings.get(*place)))

    async def _leave_meeting(self, request: web.Request) -> web.StreamResponse:
        content = await _json(request)
        self.meetings.leave(request[SILO], content.get("token"), content.get("reason", ""), time.monotonic())
        return web.json_response({})

    # ---- for the people who run it

    async def _health(self, request: web.Request) -> web.StreamResponse:
        return web.json_response({"phase": self.coordinator.machine.phase})

    async def _status(self, request: web.Request) -> web.StreamResponse:
        return web.json_response(self.coordinator.status(time.monotonic()))

    async def _metrics(self, request: web.Request) -> web.StreamResponse:
        status, now = self.coordinator.status(time.monotonic()), time.monotonic()
        lines = [
            "# TYPE lightning_fl_round gauge",
            f"lightning_fl_round {status['round']}",
            "# TYPE lightning_fl_updates gauge",
            f"lightning_fl_updates {len(status['sent'])}",
            "# TYPE lightning_fl_cohort gauge",
            f"lightning_fl_cohort {len(status['cohort'])}",
            "# TYPE lightning_fl_silo_silent_seconds gauge",
            *(
                f'lightning_fl_silo_silent_seconds{{silo="{silo}"}} {now - seen:.1f}'
                for silo, seen in self.coordinator.seen.items()
            ),
        ]
        return web.Response(text="\n".join(lines) + "\n", headers={"Content-Type": "text/plain; version=0.0.4"})


def _place(request: web.Request) -> tuple[int | None, str, str]:
    match = request.match_info
    if "round" not in match:
        return None, START, match["digest"]
    if match["topic"] == START:
        raise Refused(400, "There is no such place.")
    return integer(match["round"]), match["topic"], match["digest"]


def _bytes(content: bytes | None) -> web.Response:
    """Bytes; none: the silo is to ask again."""
    kind = "application/octet-stream"
    return web.Response(status=204) if content is None else web.Response(body=content, content_type=kind)


async def in_time(body: Awaitable[T]) -> T:
    """What is read from a connection.

    Raises:
        TimeoutError: If nothing has come for long.
        ConnectionError: If the connection has broken, whatever the network's error: others are the disk's.
    """
    try:
        return await asyncio.wait_for(body, IDLE_S)
    except (TimeoutError, asyncio.TimeoutError, ConnectionError, ssl.SSLError):
        raise
    except OSError as error:
        raise ConnectionAbortedError(*error.args) from error


async def _json(request: web.Request) -> dict[str, Any]:
    return json_object(await in_time(request.read()))
