"""A silo's calls to the coordinator: HTTPS with the standard library, repeated until they are answered."""

from __future__ import annotations

import base64
import http.client
import json
import logging
import random
import socket
import ssl
import time
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from lightning_fl.coordinator import identity, wire
from lightning_fl.coordinator.identity import Kit

TIMEOUT_S = 60.0
"""Timeout of a call in seconds; longer than the coordinator holds a call open."""
CLOCK_S = 60.0
"""Difference of clocks, in seconds, above which a silo is warned."""
PART = 1 << 25
PIECE = 1 << 20
MAX_WAIT_S = 10.0
log = logging.getLogger("lightning_fl.network")


class CallRefused(RuntimeError):
    """The coordinator has refused a call.

    Args:
        status: The HTTP status.
        facts: The fields of its answer.
    """

    def __init__(self, status: int, facts: Mapping[str, Any]) -> None:
        super().__init__(str(facts.get("error", f"HTTP status {status}")))
        self.status = status
        self.facts = facts


class NotAdmitted(RuntimeError):
    """One side does not accept the other's certificate."""


class Client:
    """Calls one coordinator over one connection.

    Args:
        address: Its address, ``https://host`` or ``https://host:port``.
        kit: Key and certificate of this silo.
        gives_up_after: Seconds after which a call without an answer raises an error. None: never.

    Raises:
        ValueError: If the address is not of this form.
    """

    def __init__(self, address: str, kit: Kit, gives_up_after: float | None = None) -> None:
        parts = urlsplit(address)
        if parts.scheme != "https" or not parts.hostname or parts.path not in ("", "/") or parts.query:
            raise ValueError(f"federation={address!r} is not an address; expected https://host or https://host:port.")
        self.address = address
        self.host, self.port = parts.hostname, parts.port or 443
        self.kit = kit
        self.gives_up_after = gives_up_after
        self.num_bytes = 0
        self._connection: http.client.HTTPSConnection | None = None

    def close(self) -> None:
        """Closes the connection; the next call opens another."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def impatient(self) -> Client:
        """A client for calls that need not reach the coordinator."""
        return Client(self.address, self.kit, gives_up_after=0)

    # ---- one call

    def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        read: Callable[[http.client.HTTPResponse], Any] | None = None,
        before_retry: Callable[[], None] = lambda: None,
    ) -> tuple[int, Mapping[str, str], Any]:
        """Makes a call until it is answered; every call may be repeated.

        Args:
            method: The HTTP method.
            path: The path of the URL.
            body: A JSON value, or a function that yields the bytes for each attempt.
            headers: Further headers.
            read: Reads the body of a successful answer. None: reads all of it.
            before_retry: Called before each attempt but the first.

        Returns:
            Status, headers and body of the answer.

        Raises:
            CallRefused: If the answer is a refusal.
            NotAdmitted: If one side does not accept the other's certificate.
        """
        started, failures = time.monotonic(), 0
        while True:
            try:
                return self._try(method, path, body, headers or {}, read)
            except (ssl.SSLCertVerificationError, ssl.SSLError, OSError, http.client.HTTPException) as error:
                self.close()
                reason = why_not_admitted(error)
                if reason is not None:
                    raise NotAdmitted(f"{self.address}: {reason}") from error
                failures += 1
                if self.gives_up_after is not None and time.monotonic() - started > self.gives_up_after:
                    raise
                if failures % 10 == 3:
                    log.warning(
                        "%s does not answer (%s: %s); still trying. `lightning-fl network check %s --kit %s` says why.",
                        *(self.address, type(error).__name__, error, self.address, self.kit.folder),
                    )
                # Random, so that silos do not all come back at the same moment.
                time.sleep(min(MAX_WAIT_S, 0.1 * 2 ** min(failures, 7)) * random.uniform(0.5, 1.0))
                before_retry()

    def _try(
        self, method: str, path: str, body: Any, headers: Mapping[str, str], read: Callable[..., Any] | None
    ) -> tuple[int, Mapping[str, str], Any]:
        if self._connection is None:
            self._connection = connect(self.host, self.port, self.kit)
        data = body() if callable(body) else None if body is None else json.dumps(body).encode()
        try:
            self._connection.request(method, path, data, dict(headers))
        except (BrokenPipeError, ConnectionResetError):
            # The coordinator may have answered, and closed, before it had read the body.
            if self._connection.sock is None:
                raise
        response = self._connection.getresponse()
        if response.status >= 500 or response.status == 408:
            content = response.read()
            raise http.client.HTTPException(f"status {response.status} {content[:200]!r}")
        if response.status >= 400:
            content = b"" if method == "HEAD" else response.read()
            self.close()  # a body that was not read completely would be taken for the next answer
            raise CallRefused(response.status, _facts(content))
        answer = response.read() if read is None else read(response)
        return response.status, dict(response.headers), answer

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """Makes a call whose answer is JSON."""
        _, _, answer = self.call(method, path, body)
        return json.loads(answer)

    # ---- files

    def upload(self, path: str, file: Path) -> None:
        """Uploads a file; after an interruption it resumes at the byte that the coordinator has reached.

        Args:
            path: The URL's path, without the digest of the content, which is appended.
            file: The file.

        Raises:
            CallRefused: If the coordinator does not accept it.
        """
        length, digest = file.stat().st_size, wire.sha256(file)
        place, headers = f"{path}/{digest}", {"Upload-Length": str(length)}

        def go_on_at(offset: int) -> None:
            headers.update({"Upload-Offset": str(offset), "Content-Length": str(min(PART, length - offset))})

        go_on_at(self._offset(place))
        with file.open("rb") as opened:

            def body() -> Any:
                opened.seek(int(headers["Upload-Offset"]))
                return _Limited(opened, int(headers["Content-Length"]))

            while True:
                try:
                    _, _, answer = self.call(
                        "PUT", place, body, headers, before_retry=lambda: go_on_at(self._offset(place))
                    )
                except CallRefused as refused:
                    if refused.status != 409 or "offset" not in refused.facts:
                        raise
                    go_on_at(int(refused.facts["offset"]))
                    continue
                self.num_bytes += int(headers["Content-Length"])
                facts = json.loads(answer)
                if facts["complete"]:
                    return
                go_on_at(int(facts["offset"]))

    def _offset(self, place: str) -> int:
        _, headers, _ = self.call("HEAD", place)
        return int(headers.get("Upload-Offset", "0"))

    def download(self, path: str, file: Path, digest: str) -> None:
        """Downloads a file; after an interruption it resumes where it was.

        Args:
            path: The URL's path.
            file: The target, which appears only when it is complete.
            digest: SHA-256 of the content.
        """
        part = file.with_name(f"{digest}.part")
        for other in file.parent.glob("*.part"):
            if other != part:
                other.unlink()
        while True:
            offset = part.stat().st_size if part.exists() else 0

            def read(response: http.client.HTTPResponse, offset: int = offset) -> None:
                with part.open("ab" if response.status == 206 else "wb") as opened:
                    while piece := response.read(PIECE):
                        opened.write(piece)

            try:
                self.call("GET", path, headers={"Range": f"bytes={offset}-"} if offset else {}, read=read)
            except CallRefused as refused:
                if refused.status != 416:  # all of it is here
                    raise
            if wire.sha256(part) == digest:
                part.replace(file)
                return
            part.unlink()


class _Limited:
    """The next bytes of a file, as ``http.client`` reads a body."""

    def __init__(self, file: Any, length: int) -> None:
        self.file = file
        self.left = length

    def read(self, size: int = PIECE) -> bytes:
        data: bytes = self.file.read(min(PIECE, self.left))
        self.left -= len(data)
        return data


def connect(host: str, port: int, kit: Kit, timeout: float = TIMEOUT_S) -> http.client.HTTPSConnection:
    """A connection to a coordinator, through the proxy that HTTPS_PROXY names."""
    context = identity.client_context(kit)
    proxy = None if urllib.request.proxy_bypass(host) else urllib.request.getproxies().get("https")
    if not proxy:
        return _Connection(host, port, timeout=timeout, context=context)
    parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    connection = _Connection(parts.hostname or "", parts.port or 3128, timeout=timeout, context=context)
    headers = {}
    if parts.username:
        password = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        headers["Proxy-Authorization"] = "Basic " + base64.b64encode(password.encode()).decode()
    connection.set_tunnel(host, port, headers)
    return connection


class _Connection(http.client.HTTPSConnection):
    """A connection that detects when the other side has died."""

    def connect(self) -> None:
        super().connect()
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


# TLS 1.3 alerts by which the coordinator says why it rejects this silo's certificate.
_ALERTS = {
    "CERTIFICATE_REQUIRED": "it asks for a certificate and got none",
    "UNKNOWN_CA": "it does not know the authority that has signed this silo's certificate",
    "CERTIFICATE_EXPIRED": "this silo's certificate has ended; `lightning-fl network renew` asks for another",
    "CERTIFICATE_REVOKED": "this silo's certificate was revoked",
    "BAD_CERTIFICATE": "it does not accept this silo's certificate",
    "UNSUPPORTED_CERTIFICATE": "this silo's certificate is not one of a silo",
    "PROTOCOL_VERSION": "it does not speak TLS 1.3: something on the way ends TLS, or it is not a coordinator",
}


def why_not_admitted(error: BaseException) -> str | None:
    """Why one side rejects the other's certificate; None if the error is of another kind."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate is not accepted: {error.verify_message}"
    if isinstance(error, ssl.SSLError) and error.reason is not None and "ALERT" in error.reason:
        return next((text for name, text in _ALERTS.items() if name in error.reason), None)
    return None


def _facts(content: bytes) -> dict[str, Any]:
    try:
        facts = json.loads(content)
    except ValueError:
        facts = None
    return facts if isinstance(facts, dict) else {"error": content[:200].decode(errors="replace")}
