"""Differences between Windows and POSIX, in one place. Based on Windows' documentation; the tests run on Linux."""

from __future__ import annotations

import os
from pathlib import Path

IS_WINDOWS = os.name == "nt"
_FAR = 0x7FFF0000
"""Offset of the locked byte on Windows: beyond the content, because a lock prevents others from reading it."""


def lock_file(descriptor: int, wait: bool) -> None:
    """Locks an open file until it is closed, for this process alone.

    Args:
        descriptor: The file.
        wait: Whether to wait for another process that has locked it; on Windows for at most 10 seconds.

    Raises:
        OSError: If another process has locked it.
    """
    if IS_WINDOWS:
        import msvcrt

        place = os.lseek(descriptor, 0, os.SEEK_CUR)
        os.lseek(descriptor, _FAR, os.SEEK_SET)
        try:
            msvcrt.locking(descriptor, msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        finally:
            os.lseek(descriptor, place, os.SEEK_SET)
        return
    import fcntl

    fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)


def flush_folder(path: Path) -> None:
    """Flushes a folder's entries to the disk; Windows does so itself, and can't open folders."""
    if IS_WINDOWS:
        return
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def rights(status: os.stat_result) -> int:
    """The permission bits of a file's owner, group and others; 0 on Windows, whose access control lists aren't read."""
    return 0 if IS_WINDOWS else status.st_mode & 0o777


def is_of_another(status: os.stat_result) -> bool:
    """Whether a file belongs to a user other than this one and root."""
    return not IS_WINDOWS and status.st_uid not in (os.geteuid(), 0)
