"""A silo's key files: its identity, and the identities it trusts."""

from __future__ import annotations

import base64
import binascii
import os
from dataclasses import dataclass
from pathlib import Path

from lightning_fl.files import write_whole
from lightning_fl.os_differences import is_of_another, rights
from lightning_fl.privacy.secagg.participant import fingerprint
from lightning_fl.privacy.secagg.primitives import KEY_BYTES, SigningKey

IDENTITY, PUBLIC, TRUSTED, JOURNAL = "identity.key", "identity.pub", "trusted", "sent"
PREFIX = "lightning-fl-ed25519"


@dataclass(frozen=True)
class PublicIdentity:
    """A public identity, written as a line ``lightning-fl-ed25519 <base64> <name>``.

    Args:
        key: The Ed25519 key, 32 bytes.
        name: A label for people; it is not authenticated.
    """

    key: bytes
    name: str = ""

    def __str__(self) -> str:
        return f"{PREFIX} {base64.b64encode(self.key).decode()} {self.name}".rstrip()

    @property
    def fingerprint(self) -> str:
        """A short hash of the key, for people to compare."""
        return fingerprint(self.key)

    @classmethod
    def parse(cls, line: str) -> PublicIdentity:
        """Parses a line.

        Raises:
            ValueError: If it holds no public key.
        """
        vector = line.split(maxsplit=2)
        try:
            key = base64.b64decode(vector[1], validate=True) if vector[0] == PREFIX else b""
        except (IndexError, binascii.Error):
            key = b""
        if len(key) != KEY_BYTES:
            raise ValueError(f"{line.strip()[:80]!r} is no public key; expected a line '{PREFIX} <key> <name>'.")
        return cls(key, _printable(vector[2].strip()) if len(vector) > 2 else "")


class KeyFolder:
    """A folder with a silo's identity (mode 0600), its public key, its trusted identities and its journal.

    Args:
        path: The folder.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def journal_path(self) -> Path:
        """The file that records with which silos each vector was summed."""
        return self.path / JOURNAL

    def exists(self) -> bool:
        """Returns whether the folder holds an identity."""
        return (self.path / IDENTITY).exists()

    def set_aside(self) -> None:
        """Renames the identity's files, which keep their fingerprint in their names."""
        mark = self.public().fingerprint.replace(":", "").replace(" ", "")[:16]
        for name in (IDENTITY, PUBLIC):
            if (self.path / name).exists():
                (self.path / name).rename(self.path / f"{name}.{mark}")

    def create(self, name: str = "") -> PublicIdentity:
        """Creates an identity.

        Raises:
            ValueError: If there is one already, which is never overwritten, or others may write into the folder.
        """
        if self.exists():
            raise ValueError(
                f"{self.path / IDENTITY} exists and stays as it is: others trust that key. Use another folder, or "
                "set it aside and make a new one with --force; the others then have to trust the new key."
            )
        key = SigningKey()
        self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        _check_folder(self.path)
        public = PublicIdentity(key.public, _printable(name or self.path.name))
        try:
            write_whole(self.path / IDENTITY, base64.b64encode(key.private_bytes()) + b"\n", replaces=False)
        except FileExistsError:
            raise ValueError(f"{self.path / IDENTITY} was made by somebody else just now; it stays.") from None
        write_whole(self.path / PUBLIC, f"{public}\n".encode(), mode=0o644)
        return public

    def identity(self) -> SigningKey:
        """Reads the silo's identity.

        Raises:
            ValueError: If there is none, it is damaged, or others may read it.
        """
        path = self.path / IDENTITY
        if not path.exists():
            raise ValueError(f"{path} does not exist. Make an identity: lightning-fl keys create {self.path}")
        _check_mode(path)
        try:
            return SigningKey(base64.b64decode(path.read_text(encoding="utf-8").strip(), validate=True))
        except ValueError:
            raise ValueError(f"{path} holds no identity. Restore it, or make a new one in another folder.") from None

    def public(self) -> PublicIdentity:
        """Reads the silo's public key, to be given to the other silos."""
        lines = (self.path / PUBLIC).read_text(encoding="utf-8").splitlines() if (self.path / PUBLIC).exists() else []
        name = PublicIdentity.parse(lines[0]).name if lines else self.path.name
        return PublicIdentity(self.identity().public, name)

    def trusted(self) -> list[PublicIdentity]:
        """Reads the identities that the silo trusts, besides its own.

        Raises:
            ValueError: If the file is damaged, or others may write it.
        """
        path = self.path / TRUSTED
        if not path.exists():
            return []
        _check_mode(path)
        return [PublicIdentity.parse(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]

    def trust(self, identities: list[PublicIdentity]) -> list[PublicIdentity]:
        """Adds identities to the trusted ones, except the silo's own; returns those that are new."""
        known = {identity.key for identity in self.trusted()} | {self.identity().public}
        new = [identity for identity in identities if identity.key not in known]
        new = list({identity.key: identity for identity in new}.values())
        if new:
            write_whole(self.path / TRUSTED, "".join(f"{identity}\n" for identity in [*self.trusted(), *new]).encode())
        return new


def _printable(name: str) -> str:
    """Removes escape codes from a name: in a terminal they could overwrite the fingerprint that is shown beside it."""
    return "".join(character for character in name if character.isprintable())


def _check_folder(path: Path) -> None:
    status = path.stat()
    mode = rights(status)
    if mode & 0o022:
        raise ValueError(f"{path} has mode {mode:04o}: others on this machine can put files into it. chmod 700 {path}")
    _check_owner(path, status)


def _check_owner(path: Path, status: os.stat_result) -> None:
    if is_of_another(status):
        raise ValueError(f"{path} belongs to user {status.st_uid}, who can change it. Use a folder of your own.")


def _check_mode(path: Path) -> None:
    # Whoever may write into the folder may replace the file, whatever its own mode.
    _check_folder(path.parent)
    status = path.stat()
    _check_owner(path, status)
    mode = rights(status)
    if mode & 0o077:
        raise ValueError(f"{path} has mode {mode:04o}: others on this machine can read or change it. chmod 600 {path}")
