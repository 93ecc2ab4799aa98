"""IDX files, the format of MNIST."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np


def read_idx(path: str | Path) -> np.ndarray:
    """Reads an IDX file of unsigned bytes, gzipped or not.

    Bytes 0 and 1 are 0, byte 2 is the type (8: unsigned bytes), byte 3 the number of axes. Then come the sizes of the
    axes, 4 big-endian bytes each, and the values.

    Args:
        path: The file.

    Returns:
        uint8 array of the shape that the header gives.

    Raises:
        ValueError: If the file is corrupt, truncated or of another format.
    """
    data = Path(path).read_bytes()
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{path} is corrupt or truncated ({error}). Delete it and download it again.") from error
    start = 4 + 4 * data[3] if len(data) > 3 else 4
    if data[:3] != b"\x00\x00\x08" or start == 4 or len(data) < start:
        raise ValueError(
            f"{path} is not an IDX file of unsigned bytes: it begins with {data[:4].hex(' ') or 'nothing'}, expected "
            "00 00 08, the number of axes (at least 1) and their sizes. Delete it and download it again."
        )
    shape = np.frombuffer(data[4:start], dtype=">u4").tolist()
    if len(data) - start != math.prod(shape):
        raise ValueError(
            f"{path} is corrupt or truncated: it holds {len(data) - start} values, but its header gives the shape "
            f"{shape}, which needs {math.prod(shape)}. Delete it and download it again."
        )
    return np.frombuffer(bytearray(data), dtype=np.uint8, offset=start).reshape(shape)  # bytearray: writable
