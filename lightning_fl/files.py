"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import secrets
from functools import partial
from pathlib import Path


def write_whole(path: Path, data: bytes, mode: int = 0o600, replaces: bool = True, durable: bool = True) -> None:
    """Writes a file under another name and renames it: a reader finds the old content or the new, also after a crash.

    Args:
        path: The file.
        data: Its content.
        mode: Its rights, from the first byte on and less those that the umask takes. Default: its owner's.
        replaces: Whether it may take the place of another file.
        durable: Whether it is flushed to the disk before it is renamed. A rename may reach the disk before the content
            does; after a power failure the file would be empty. That it has its name then, too, takes a
            :func:`~lightning_fl.os_differences.flush_folder`.

    Raises:
        FileExistsError: If there is a file, and it may not be replaced.
    """
    # In the same folder, because a rename is atomic only within a file system, and under a name of its own, so that
    # processes that write the same file at once don't write into one another's.
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
            os.link(unfinished, path)  # fails if there is a file, also one that was made since somebody looked
    finally:
        unfinished.unlink(missing_ok=True)
