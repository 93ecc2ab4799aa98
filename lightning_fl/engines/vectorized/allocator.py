"""Memory that a step has freed, kept for the next step."""

from __future__ import annotations

import ctypes
import os
import sys

MAX_FROM_HEAP = 32 * 2**20
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of <malloc.h>


def keep_freed_memory(num_bytes: int) -> bool:
    """Lets the C library keep freed memory instead of giving it back to the operating system.

    Steps of many clients allocate and free megabytes each time, and to fetch them anew from the operating system can
    take longer than the arithmetic. Holds for the whole process from now on. Does nothing where the C library is not
    glibc, and where the user's environment variables rule its ``malloc``.

    Args:
        num_bytes: Bytes that may be kept beyond what is in use.

    Returns:
        Whether it holds.
    """
    chosen = {name for name in os.environ if name.startswith("MALLOC_")}
    if chosen or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "") or not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    return bool(library.mallopt(_M_MMAP_THRESHOLD, MAX_FROM_HEAP) and library.mallopt(_M_TRIM_THRESHOLD, num_bytes))
