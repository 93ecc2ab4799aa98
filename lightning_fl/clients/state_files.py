"""Client states on disk: immutable, content-addressed versions, and the checkpoints that refer to them."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import quote

from safetensors.torch import load, save

from lightning_fl.files import write_whole
from lightning_fl.tree import flatten, unflatten
from lightning_fl.types import ClientId, State

_MAX_FOLDER_NAME = 100
Manifest = dict[ClientId, str]
"""The name of the version of each client that has a state."""


class StateFiles:
    """A folder of client states.

    A version is a safetensors file named by the digest of its content, so it never changes: a checkpoint stays valid
    while training goes on, and clients that have not trained since take no further space. A manifest lists one version
    of each client; each checkpoint refers to its manifests. :meth:`collect` removes files that no checkpoint refers to.

    Files and folders are readable by their owner only: a state may hold a client's own gradient.

    Args:
        root: The folder; created at the first write.
        durable: Whether to flush each file to the disk before going on. Checkpoints need it, scratch files do not.
    """

    def __init__(self, root: Path, durable: bool = True) -> None:
        self.root = root
        self.durable = durable

    def write(self, client: ClientId, state: State) -> str:
        """Writes a version of a client's state and returns its name.

        Raises:
            TypeError: If the state holds anything but tensors in nested mappings.
        """
        # Cloned, because safetensors refuses tensors that share memory, such as views of a buffer or tied tensors.
        tensors = {name: value.detach().cpu().contiguous().clone() for name, value in flatten(state).items()}
        data = save(tensors)
        name = hashlib.blake2b(data, digest_size=16).hexdigest()
        # Files are named by content, so an existing file is the same version.
        self._write(self._path(client, name), data, durable=self.durable)
        return name

    def read(self, client: ClientId, name: str) -> State:
        """Reads a version.

        Raises:
            FileNotFoundError: If there is no such file.
        """
        path = self._path(client, name)
        if not path.exists():
            raise FileNotFoundError(
                f"The state of client {client!r} is not at {path}. Client states are in the folder `client_states` "
                "beside the checkpoint; copy it along with the checkpoint."
            )
        return unflatten(load(path.read_bytes()))

    def remove(self, client: ClientId, name: str) -> None:
        """Removes a version."""
        self._path(client, name).unlink()

    def copy_from(self, other: StateFiles, client: ClientId, name: str) -> None:
        """Copies a version from another folder, as a hard link if the file system allows it."""
        target = self._path(client, name)
        if not target.exists():
            self._make_folder(target.parent)
            try:
                os.link(other._path(client, name), target)
            except FileExistsError:  # another process was faster, with the same content
                return
            except OSError:  # another file system, or one without hard links
                shutil.copyfile(other._path(client, name), target)
                target.chmod(0o600)

    def write_manifest(self, manifest: Manifest, name: str | None = None) -> str:
        """Writes a manifest and returns its name; by default the digest of its content."""
        # Sorted, so that equal manifests have equal digests; by repr, because ids may be both numbers and strings.
        data = json.dumps(sorted(manifest.items(), key=repr)).encode()
        digest = hashlib.blake2b(data, digest_size=16).hexdigest()
        self._write(self.root / "manifests" / f"{name or digest}.json", data, replace=name is not None)
        return name or digest

    def read_manifest(self, name: str) -> Manifest | None:
        """Reads a manifest; None if there is no such file.

        Raises:
            ValueError: If the name is not a plain file name, such as a path.
        """
        # It comes from a checkpoint, which another party may have written.
        _check_name(name)
        path = self.root / "manifests" / f"{name}.json"
        return dict(map(tuple, json.loads(path.read_text(encoding="utf-8")))) if path.exists() else None

    def name(self, checkpoint: str, manifests: Iterable[str], also_old: bool) -> None:
        """Records which manifests a checkpoint refers to.

        Args:
            checkpoint: File name of the checkpoint.
            manifests: Names of its manifests.
            also_old: Whether to keep the manifests recorded before, because the existing checkpoint of the same name
                still needs them.
        """
        path = self.root / "checkpoints" / f"{checkpoint}.json"
        old = json.loads(path.read_text(encoding="utf-8")) if also_old and path.exists() else []
        self._write(path, json.dumps(sorted({*old, *manifests})).encode(), replace=True)

    def forget(self, checkpoint: str) -> None:
        """Records that a checkpoint was deleted."""
        (self.root / "checkpoints" / f"{checkpoint}.json").unlink(missing_ok=True)

    def collect(self) -> None:
        """Garbage collection: removes manifests and versions that no checkpoint refers to."""
        named = {
            name
            for path in (self.root / "checkpoints").glob("*.json")
            for name in json.loads(path.read_text(encoding="utf-8"))
        }
        needed: set[Path] = set()
        for path in (self.root / "manifests").glob("*.json"):
            if path.stem in named:
                needed.update(
                    self._path(client, name) for client, name in (self.read_manifest(path.stem) or {}).items()
                )
            else:
                path.unlink()
        for path in self.root.glob("versions/*/*.safetensors"):
            if path not in needed:
                path.unlink()
                if not any(path.parent.iterdir()):
                    path.parent.rmdir()

    def _make_folder(self, folder: Path) -> None:
        # One by one, because `parents=True` gives the parents the default mode. Folders above the root are the user's.
        self.root.parent.mkdir(parents=True, exist_ok=True)
        below = [folder, *folder.parents]
        for missing in reversed(below[: below.index(self.root) + 1]):
            missing.mkdir(mode=0o700, exist_ok=True)

    def _write(self, path: Path, data: bytes, replace: bool = False, durable: bool = True) -> None:
        if path.exists() and not replace:
            return
        self._make_folder(path.parent)
        write_whole(path, data, durable=durable)

    def _path(self, client: ClientId, name: str) -> Path:
        _check_name(name)
        return self.root / "versions" / folder_name(client) / f"{name}.safetensors"


def _check_name(name: str) -> None:
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise ValueError(f"A checkpoint names {name!r} as a file of client states, which is not a plain file name.")


def folder_name(client: ClientId) -> str:
    """A client's own folder name, short and in ASCII, so that any file system takes it."""
    # The repr tells client 1 from client "1"; quoting makes any name one valid folder name.
    name = quote(repr(client), safe="")
    if len(name) <= _MAX_FOLDER_NAME:
        return name
    # File systems allow 255 bytes; a quoted non-ASCII character takes up to 12.
    return f"{name[:32]}~{hashlib.blake2b(name.encode(), digest_size=16).hexdigest()}"
