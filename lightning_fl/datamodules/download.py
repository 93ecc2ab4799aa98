"""Downloads of data sets, verified by SHA-256."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RemoteFile:
    """A file on a server.

    Args:
        name: Its name on disk.
        url: Its address.
        size: Its size in bytes, which is shown before the download.
        sha256: Its SHA-256 checksum, hexadecimal.
    """

    name: str
    url: str
    size: int
    sha256: str


class DownloadError(OSError):
    """A file could not be downloaded, or its checksum is wrong."""


def download(
    title: str, files: Sequence[RemoteFile], folder: str | Path, timeout: float = 30.0, retries: int = 2
) -> list[Path]:
    """Downloads the files that are not yet in a folder.

    A file gets its name only after its checksum is verified; an interrupted download leaves nothing behind. If several
    processes share the folder, one downloads each file and the others wait.

    Args:
        title: Name of the data set, for the messages.
        files: The files to download.
        folder: The folder of the files; created if necessary.
        timeout: Seconds without a response after which a connection counts as broken.
        retries: Number of times that a failed download is retried, at least 0.

    Returns:
        The files' paths.

    Raises:
        DownloadError: If a server does not answer, the connection breaks, or a checksum is wrong.
        ImportError: If a file is missing and pooch is not installed.
    """
    folder = Path(folder)
    missing = [file for file in files if not (folder / file.name).exists()]
    if missing:
        try:  # imported here, so that files already on disk can be read without pooch
            import pooch  # noqa: F401
            from filelock import FileLock
        except ImportError as error:
            raise ImportError(
                f'Downloading {title} needs pooch: pip install "lightning-fl[data]". Or put '
                f"{', '.join(file.name for file in missing)} into {folder} by hand."
            ) from error
        folder.mkdir(parents=True, exist_ok=True)
        size = sum(file.size for file in missing) / 1e6
        print(f"Downloading {title}: {len(missing)} file(s), {size:.1f} MB, to {folder}", file=sys.stderr)
        with FileLock(folder / ".download.lock"):
            for file in missing:
                if not (folder / file.name).exists():  # another process may have downloaded it meanwhile
                    _fetch(file, folder, timeout, retries)
    return [folder / file.name for file in files]


def _fetch(file: RemoteFile, folder: Path, timeout: float, retries: int) -> None:
    import pooch
    from tqdm import tqdm

    source = pooch.create(
        folder, "", registry={file.name: f"sha256:{file.sha256}"}, urls={file.name: file.url}, retry_if_failed=retries
    )
    with tqdm(desc=file.name, total=file.size, unit="B", unit_scale=True) as progress:
        # pooch's default chunks of 1 KiB, each flushed, are slow for large files
        downloader = pooch.HTTPDownloader(progressbar=progress, chunk_size=1 << 16, timeout=timeout)
        try:
            path = Path(source.fetch(file.name, downloader=downloader))
        except (OSError, ValueError) as error:  # ValueError: the checksum is wrong
            raise DownloadError(
                f"{file.url} could not be downloaded ({error}). Nothing was saved. Try again, or put {file.name} into "
                f"{folder} by hand."
            ) from error
    # pooch makes the file readable by its owner only, but a data folder is often shared
    path.chmod(0o644)
