"""Diagnoses why a silo can't reach its coordinator, in one sentence per cause."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
import time
import urllib.request
from collections.abc import Iterator
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from pathlib import Path
from urllib.parse import urlsplit

from lightning_fl.coordinator.client import CLOCK_S, connect, why_not_admitted
from lightning_fl.coordinator.identity import Kit, names_in


def diagnose(address: str, folder: str | Path) -> Iterator[str]:
    """Yields a line for each step that works.

    Raises:
        ValueError: At the first step that fails, with the cause and the remedy.
    """
    parts = urlsplit(address)
    if parts.scheme != "https" or not parts.hostname:
        raise ValueError(f"{address!r} is not an address; expected https://host or https://host:port.")
    host, port = parts.hostname, parts.port or 443
    kit = Kit(folder)
    certificate = kit.check()
    federation, name = names_in(certificate)
    days = (certificate.not_valid_after_utc - datetime.now(timezone.utc)).days
    whole = (certificate.not_valid_after_utc - certificate.not_valid_before_utc).days
    if days < 0:
        raise ValueError(f"The certificate of {name!r} has ended. Run: lightning-fl network renew {kit.folder}")
    soon = f"; renew it soon: lightning-fl network renew {kit.folder}" if days < whole / 2 else ""
    yield f"kit: {name!r} of the federation {federation!r}, certificate good for {days} days{soon}"
    proxy = None if urllib.request.proxy_bypass(host) else urllib.request.getproxies().get("https")
    if proxy is None:
        try:
            found = sorted({str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)})
        except socket.gaierror as error:
            raise ValueError(
                f"The name {host!r} can't be resolved here ({error.strerror}). Ask the DNS administrator, or give an "
                "address."
            ) from error
        yield f"name: {host} is {', '.join(found)}"
    else:
        yield f"proxy: {urlsplit(proxy).hostname}"
    yield from _speak(host, port, kit, proxy)


def _speak(host: str, port: int, kit: Kit, proxy: str | None) -> Iterator[str]:
    connection = connect(host, port, kit, timeout=10.0)
    try:
        connection.connect()
        yield "TLS 1.3: the coordinator's certificate is good"
        connection.request("GET", "/v1/check")
        response = connection.getresponse()
        body = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise ValueError(_cause(error, host, port, proxy)) from error
    finally:
        connection.close()
    try:
        facts = json.loads(body)
    except ValueError:
        facts = {}
    if response.status == 403:
        raise ValueError(f"The coordinator refuses this silo: {facts.get('error', 'no reason given')}")
    if facts.get("service") != "lightning_fl":
        raise ValueError(
            f"{host}:{port} answers (status {response.status}), but is not a coordinator. Is a load balancer or an "
            "inspecting proxy in between? It must pass TLS through unopened."
        )
    yield "coordinator: this silo is admitted"
    ahead = time.time() - parsedate_to_datetime(response.headers["Date"]).timestamp()
    if abs(ahead) > CLOCK_S:
        yield f"clock: WARNING, {ahead:+.0f} s off the coordinator's; certificates depend on it, rounds do not"
    else:
        yield "clock: agrees with the coordinator's"


def _cause(error: Exception, host: str, port: int, proxy: str | None) -> str:
    where, reason = f"{host}:{port}", getattr(error, "reason", "") or ""
    if proxy is not None and "Tunnel connection failed" in str(error):
        return f"The proxy does not let this silo through to {where} ({error}). Ask for a rule for this one name."
    if isinstance(error, ssl.SSLCertVerificationError):
        text = error.verify_message
        if "not yet valid" in text or "expired" in text:
            return f"The coordinator's certificate is out of its time ({text}). Is the clock of this machine right?"
        if "mismatch" in text or "doesn't match" in text or "not valid for" in text:
            return f"The coordinator's certificate is for another name ({text}). Use the name that is in it."
        return (
            f"The certificate that {where} shows is not of this federation's authority ({text}). Something in between "
            "opens TLS: a load balancer or an inspecting proxy. It must pass TLS through unopened."
        )
    if isinstance(error, ssl.SSLError):
        if "WRONG_VERSION_NUMBER" in reason or "HTTP_REQUEST" in reason or "RECORD_LAYER_FAILURE" in reason:
            return f"{where} does not speak TLS: a plain HTTP server, or a balancer that has ended TLS."
        if "PROTOCOL_VERSION" in reason:
            return f"{where} does not speak TLS 1.3: a balancer that ends TLS, or no coordinator."
        return f"{where}: {why_not_admitted(error) or error}"
    if isinstance(error, socket.gaierror):
        return f"The proxy's name can't be resolved here: {error.strerror}."
    if isinstance(error, TimeoutError):
        return f"{where} does not answer: a firewall drops it. Ask for outbound TCP to this one name and port."
    if isinstance(error, ConnectionRefusedError):
        return f"Nothing listens on {where}. Is the coordinator running, and is the port right?"
    if isinstance(error, ConnectionResetError | http.client.RemoteDisconnected):
        return (
            f"{where} closes the connection. The coordinator may refuse this silo's certificate (its audit log says "
            "why), or something in between cuts TLS."
        )
    return f"{where}: {error}"
