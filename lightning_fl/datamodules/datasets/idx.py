"""IDX files, the format of MNIST: a header of big-endian numbers, then the values."""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np

_MAX_BYTES = 1 << 32
_CHUNK = 1 << 20


def read_idx(path: str | Path) -> np.ndarray:
    """Reads an IDX file of unsigned bytes, compressed by gzip or not.

    Bytes 0 and 1 are 0, byte 2 is the type (8 for unsigned bytes), byte 3 the number of axes; then come the sizes of
    the axes, 4 bytes each, and the values.

    Args:
        path: The file.

    Returns:
        uint8 of the shape that the file states.

    Raises:
        ValueError: If the file is corrupt, cut short or of another format.
    """
    path = Path(path)
    with path.open("rb") as raw:
        is_gzip = raw.read(2) == b"\x1f\x8b"
    try:
        with cast(BinaryIO, gzip.open(path)) if is_gzip else path.open("rb") as stream:
            header = stream.read(4)
            if len(header) != 4 or header[:3] != b"\x00\x00\x08" or not 1 <= header[3] <= 8:
                raise ValueError(
                    f"{path} is no IDX file of unsigned bytes: it begins with {header.hex(' ') or 'nothing'}, expected "
                    "00 00 08 and the number of axes."
                )
            sizes = np.frombuffer(_exactly(stream, 4 * header[3], path), dtype=">u4").tolist()
            if math.prod(sizes) > _MAX_BYTES:
                raise ValueError(
                    f"{path} states the shape {sizes}, which is too large to be true; the file is corrupt."
                )
            values = np.empty(math.prod(sizes), dtype=np.uint8)
            for start in range(0, len(values), _CHUNK):
                piece = values[start : start + _CHUNK]
                piece[:] = np.frombuffer(_exactly(stream, len(piece), path), dtype=np.uint8)
            if stream.read(1):
                raise ValueError(f"{path} has more bytes than its shape {sizes} needs; the file is corrupt.")
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path} is corrupt or cut short ({error}). Remove it and get it anew.") from error
    return values.reshape(sizes)


def _exactly(stream: BinaryIO, number: int, path: Path) -> bytes:
    data = stream.read(number)
    if len(data) != number:
        raise ValueError(f"{path} is cut short: {number - len(data)} bytes are missing at its end. Get it anew.")
    return data
