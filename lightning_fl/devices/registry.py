"""The registry of devices: a file with the digest of each device's token."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning_fl.coordinator.disk import Disk, read_json
from lightning_fl.os_differences import lock_file

NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")


class Registry:
    """The devices of a federation. Tokens are shown once and never stored.

    Args:
        path: The file; changes by another process are noticed at the next access.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._version: tuple[int, int] | None = None
        self._digests: dict[str, str] = {}

    @property
    def names(self) -> list[str]:
        """The devices, sorted."""
        return sorted(self._read())

    def __contains__(self, name: str) -> bool:
        return name in self._read()

    def enrol(self, name: str) -> str:
        """Enrols a device, or gives it a new token; returns the token.

        Raises:
            ValueError: If the name has other characters than lower-case letters, digits, ``-`` and ``_``.
        """
        if not NAME.fullmatch(name):
            raise ValueError(f"A device can't be called {name!r}; expected up to 63 of a-z, 0-9, - and _.")
        secret = secrets.token_urlsafe(32)
        with self._alone():
            self._write({**self._read(), name: _digest(secret)})
        return f"{name}.{secret}"

    def revoke(self, name: str) -> None:
        """Revokes a device.

        Raises:
            ValueError: If there is no device of this name.
        """
        with self._alone():
            known = self._read()
            if name not in known:
                raise ValueError(f"There is no device {name!r} in {self.path}.")
            self._write({other: digest for other, digest in known.items() if other != name})

    def device_of(self, token: str) -> str | None:
        """The name of the device with a token; None if there is none."""
        name, _, secret = token.partition(".")
        # A digest without salt, because the tokens are 256 random bits.
        found = hmac.compare_digest(self._read().get(name, ""), _digest(secret))
        return name if found else None

    def _read(self) -> dict[str, str]:
        if not self.path.exists():
            return {}
        stat = self.path.stat()
        version = stat.st_ino, stat.st_mtime_ns
        if version != self._version:
            self._digests, self._version = read_json(self.path), version
        return self._digests

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keeps other processes from changing the file in the block."""
        Disk().make_folder(self.path.parent)
        file = os.open(self.path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o600)
        try:
            lock_file(file, wait=True)
            yield
        finally:
            os.close(file)

    def _write(self, digests: dict[str, str]) -> None:
        Disk().write_json(self.path, digests)


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode(errors="surrogatepass")).hexdigest()  # a header may contain any byte
