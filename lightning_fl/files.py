"""Files that appear completely or not at all."""

from __future__ import annotations

import os
import secrets
from functools import partial
from pathlib import Path


def write_whole(path: Path, data: bytes, mode: int = 0o600, replaces: bool = True, durable: bool = True) -> None:
    """Writes a file under a temporary name and renames it: readers see the old or the new content, even after a crash.

    Args:
        path: The file.
        data: Its content.
        mode: Its permissions, masked by the umask, from the first byte on. Default: read and write for the owner only.
        replaces: Whether it may replace an existing file.
        durable: Whether it is flushed to the disk before it is renamed. Otherwise the rename may reach the disk before
            the content, and the file would be empty after a power failure. For the name to survive it too, call
            :func:`~lightning_fl.os_differences.flush_folder`.

    Raises:
        FileExistsError: If there is a file, and it may not be replaced.
    """
    # In the same folder, because a rename is atomic only within a file system, and under a unique name, so that
    # processes that write the same file at once don't overwrite each other's.
    unfinished = path.with_name(f"{path.name}.{secrets.token_hex(4)}.unfinished")
    try:
        with open(unfinished, "xb", opener=partial(os.open, mode=mode)) as file:
            file.write(data)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        if replaces:
            unfinished.replace(path)
        else:
            os.link(unfinished, path)  # fails if the file exists, even if it was created after a check
    finally:
        unfinished.unlink(missing_ok=True)
