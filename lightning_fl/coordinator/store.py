"""The coordinator's folder: plain files, changed so that a crash at any moment leaves the old round or the new one.

::

    state.json                                   the commit: round, digests of the state, history
    states/<sha256>.safetensors                  the states that it refers to
    rounds/000012/cohort.json                    written before a silo is told that the round is open
    rounds/000012/update/<silo>.<sha256>.part    an update that is being uploaded
    rounds/000012/update/<silo>.<sha256>.ok      an update that is complete and valid
    rounds/000012/update/outcome.safetensors     the outcome of the closed round, which every silo may read
    versions.json  arriving/                     asynchronous rounds: each silo's start version, incoming updates
    audit.jsonl  lock
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_fl.coordinator import wire
from lightning_fl.coordinator.disk import Disk, read_json
from lightning_fl.os_differences import lock_file
from lightning_fl.types import Tree

OUTCOME = "outcome.safetensors"
"""The outcome of a round, an exchange or a step of a secure sum, which silos may read."""


@dataclass(frozen=True)
class Upload:
    """A file that a silo uploads.

    Args:
        folder: The target folder.
        silo: The sender.
        digest: SHA-256 of the whole file.
    """

    folder: Path
    silo: str
    digest: str

    @property
    def part(self) -> Path:
        """The file during the upload."""
        return self.folder / f"{self.silo}.{self.digest}.part"

    @property
    def ok(self) -> Path:
        """The file once it is complete and valid."""
        return self.folder / f"{self.silo}.{self.digest}.ok"

    @property
    def size(self) -> int:
        """Number of bytes received."""
        return self.part.stat().st_size if self.part.exists() else 0


class Store:
    """The files of a federation.

    Args:
        root: Its folder.
        disk: Performs every change. None: a new :class:`Disk`.

    Raises:
        ValueError: If another coordinator uses the folder.
    """

    def __init__(self, root: Path, disk: Disk | None = None) -> None:
        self.root = root
        self.disk = disk or Disk()
        self.disk.make_folder(root)
        self.disk.make_folder(root / "states")
        self.disk.make_folder(root / "rounds")
        self._lock = os.open(root / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            lock_file(self._lock, wait=False)
        except OSError as error:
            os.close(self._lock)
            raise ValueError(f"Another coordinator is running in {root}. Give each federation a folder.") from error

    def close(self) -> None:
        """Lets another coordinator use the folder."""
        os.close(self._lock)

    # ---- the commit

    def load(self) -> dict[str, Any]:
        """The last commit; empty before the first."""
        return read_json(self.root / "state.json") or {}

    def commit(self, state: Mapping[str, Any]) -> None:
        """Makes a state the current one; the files that it names must have been written."""
        self.disk.write_json(self.root / "state.json", state)

    def write_state(self, tensors: Mapping[str, Tensor], fields: Mapping[str, Any] | None = None) -> str:
        """Writes tensors for a commit; returns their digest."""
        unfinished = self.root / "states" / "new.unfinished"
        self.disk.before("write state")
        digest = wire.write(unfinished, tensors, fields)
        self.disk.replace(unfinished, self.state_path(digest))
        return digest

    def read_state(self, digest: str) -> Tree:
        """The tensors of a digest."""
        return wire.read(self.state_path(digest))

    def state_path(self, digest: str) -> Path:
        """The file with the tensors of a digest."""
        return self.root / "states" / f"{digest}.safetensors"

    def collect(self, keep: set[str], round: int) -> None:
        """Deletes states that are no longer referred to, and rounds before the last two."""
        for path in (self.root / "states").iterdir():
            if path.stem not in keep:
                self.disk.delete(path)
        for path in (self.root / "rounds").iterdir():
            if path.name.isdigit() and int(path.name) < round - 1:
                self.disk.delete(path)

    # ---- a round

    def folder(self, round: int, topic: str = "") -> Path:
        """The folder of a round, or of the silos' messages in it about a topic."""
        return self.root / "rounds" / f"{round:06d}" / topic

    def write_cohort(self, round: int, cohort: set[str]) -> None:
        """Records the cohort and, the first time, when the round was opened."""
        self.disk.make_folder(self.folder(round, "update"))
        path = self.folder(round) / "cohort.json"
        opened = (read_json(path) or {"opened": time.time()})["opened"]
        self.disk.write_json(path, {"silos": sorted(cohort), "opened": opened, "attempt": self.attempt(round)})

    def attempt(self, round: int) -> int:
        """How often a round was abandoned and must open again."""
        return int((read_json(self.folder(round) / "attempt.json") or {"attempt": 0})["attempt"])

    def give_up(self, round: int) -> None:
        """Records that a round must open again, with new files from all silos."""
        self.disk.write_json(self.folder(round) / "attempt.json", {"attempt": self.attempt(round) + 1})
        self.disk.delete(self.folder(round) / "cohort.json")
        self.forget_updates(round)

    def forget_updates(self, round: int) -> None:
        """Deletes the silos' files for a round that is not open."""
        for path in self.folder(round, "update").glob("*.ok"):
            self.disk.delete(path)

    def read_cohort(self, round: int) -> tuple[set[str], float] | None:
        """The cohort, and the seconds since the round was opened; None if it has not been opened."""
        found = read_json(self.folder(round) / "cohort.json")
        if found is not None and found.get("attempt", 0) != self.attempt(round):
            return None  # the process died while it abandoned the round
        # By the wall clock, since no other survives a restart; it may have been set back.
        return None if found is None else (set(found["silos"]), max(0.0, time.time() - found["opened"]))

    def whole(self, folder: Path) -> dict[str, str]:
        """The silos whose file in a folder is complete and valid, each with its digest."""
        found = (path.name.split(".") for path in folder.glob("*.ok"))
        return {silo: digest for silo, digest, _ in found}

    def write_versions(self, round: int, versions: Mapping[str, int], too_stale: Sequence[str]) -> None:
        """Records each silo's start version, and the silos whose update was too stale for the open round."""
        content = {"round": round, "versions": dict(versions), "too_stale": list(too_stale)}
        self.disk.write_json(self.root / "versions.json", content)

    def read_versions(self) -> dict[str, Any]:
        """Reads the record that :meth:`write_versions` wrote."""
        return read_json(self.root / "versions.json") or {"round": -1, "versions": {}, "too_stale": []}

    def keep(self, upload: Upload, folder: Path | None = None) -> None:
        """Marks a file as complete and valid; partial uploads of the silo are deleted.

        Args:
            upload: The file.
            folder: The folder to move it to. None: it stays where it is.
        """
        ok = upload.ok if folder is None else replace(upload, folder=folder).ok
        with upload.part.open("rb") as file:
            self.disk.before("flush upload")
            os.fsync(file.fileno())
        self.disk.replace(upload.part, ok)
        for other in upload.folder.glob(f"{upload.silo}.*"):
            if other != ok:
                self.disk.delete(other)

    def write_outcome(self, folder: Path, tensors: Mapping[str, Tensor], fields: Mapping[str, Any]) -> None:
        """Writes an outcome, which all silos may read."""
        unfinished = folder / "outcome.unfinished"
        self.disk.before("write outcome")
        wire.write(unfinished, tensors, fields)
        self.disk.replace(unfinished, folder / OUTCOME)

    def zeros_like(self, tensor: Tensor) -> Tensor:
        """Zeros in an unlinked memory-mapped file, so that the system may page them out.

        Raises:
            OSError: If the disk has no space for them.
        """
        if not tensor.numel() or not hasattr(
            os, "posix_fallocate"
        ):  # without it a full disk would kill the process later
            return tensor
        path = self.root / "sums"
        with path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, tensor.nbytes)
        zeros = torch.from_file(str(path), shared=True, size=tensor.numel(), dtype=tensor.dtype)
        path.unlink()
        return zeros

    def free_bytes(self) -> int:
        """Free space on the folder's file system."""
        return shutil.disk_usage(self.root).free
