"""Downloads that say what they do, go on where they stopped, and leave either a verified file or none."""

from __future__ import annotations

import hashlib
import os
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

_CHUNK = 1 << 16


@dataclass(frozen=True)
class RemoteFile:
    """A file on a server.

    Args:
        name: Its name on disk.
        url: Where it is.
        size: Its size in bytes.
        sha256: Its checksum, hexadecimal.
    """

    name: str
    url: str
    size: int
    sha256: str


class DownloadError(OSError):
    """A file could not be downloaded, or is not the one that was expected."""


def download(title: str, files: Sequence[RemoteFile], folder: str | Path, timeout: float = 30.0) -> list[Path]:
    """Downloads the files that a folder does not have yet.

    What has arrived of a file is kept beside it as ``NAME.part`` when the connection breaks, and the next call goes on
    from there. A file gets its name only when its size and checksum are right; a wrong one is removed.

    Args:
        title: Name of the data set, for the messages.
        files: What to download.
        folder: Where to; made if need be.
        timeout: Seconds without an answer after which a connection counts as broken.

    Returns:
        The files' paths.

    Raises:
        DownloadError: If a server does not answer, the connection breaks, or a file is not the one expected.
    """
    folder = Path(folder)
    missing = [file for file in files if not (folder / file.name).exists()]
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        console = Console(stderr=True)
        size = sum(file.size for file in missing)
        console.print(
            f"Downloading {title}: {len(missing)} file(s), {size / 1e6:.1f} MB, into {folder}", soft_wrap=True
        )
        columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
        with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
            for file in missing:
                _fetch(file, folder / file.name, progress, timeout)
    return [folder / file.name for file in files]


def _fetch(file: RemoteFile, path: Path, progress: Progress, timeout: float) -> None:
    partial = path.with_name(f"{path.name}.part")
    with _locked(partial) as stream:
        if path.exists():
            return
        task = progress.add_task(file.name, total=file.size)
        try:
            _receive(file, stream, progress, task, timeout)
        except (urllib.error.URLError, OSError) as error:
            if isinstance(error, DownloadError):
                raise
            raise DownloadError(
                f"{file.url} could not be downloaded: {error}. {stream.tell()} of {file.size} bytes are kept in "
                f"{partial}; try again to go on, or put the file into {path.parent} by hand."
            ) from error
        stream.seek(0)
        found = (
            hashlib.file_digest(stream, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(stream)
        )
        if stream.tell() != file.size or found != file.sha256:
            size = stream.tell()
            partial.unlink()
            raise DownloadError(
                f"{file.url} is not the file expected: {size} bytes with SHA-256 {found}, expected {file.size} bytes "
                f"with {file.sha256}. It was removed. Try again; if that does not help, the file on the server has "
                "changed."
            )
        partial.replace(path)


def _receive(file: RemoteFile, stream: BinaryIO, progress: Progress, task: int, timeout: float) -> None:
    have = stream.seek(0, 2)
    if have >= file.size:
        return
    request = urllib.request.Request(file.url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=timeout) as response:
        if response.status != 206:
            stream.seek(0)
            stream.truncate()
        progress.update(task, completed=stream.tell())  # type: ignore[arg-type]
        while chunk := response.read(_CHUNK):
            stream.write(chunk)
            progress.update(task, completed=stream.tell())  # type: ignore[arg-type]
            if stream.tell() > file.size:
                return
    stream.flush()
    if stream.tell() < file.size:
        raise ConnectionError("the connection ended early")


@contextmanager
def _locked(path: Path) -> Iterator[BinaryIO]:
    """A file opened to append, which one process at a time may hold."""
    import fcntl

    while True:
        stream = path.open("a+b")
        fcntl.flock(stream, fcntl.LOCK_EX)
        if _is_at(path, stream):
            break
        stream.close()
    with stream:
        try:
            yield stream
        finally:
            if stream.seek(0, 2) == 0 and _is_at(path, stream):
                path.unlink()


def _is_at(path: Path, stream: BinaryIO) -> bool:
    """Whether the path still leads to the open file: whoever held it before may have renamed or removed it."""
    try:
        return os.path.samestat(path.stat(), os.fstat(stream.fileno()))
    except FileNotFoundError:
        return False


def _digest(stream: BinaryIO) -> str:
    digest = hashlib.sha256()
    while chunk := stream.read(_CHUNK):
        digest.update(chunk)
    return digest.hexdigest()
