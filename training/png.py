"""Grey pictures as PNG files, which need no library: a header, the compressed rows, an end.

Source: "Portable Network Graphics (PNG) Specification", W3C.
"""

import struct
import zlib
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_GREY_8_BIT = bytes([8, 0, 0, 0, 0])  # bits a pixel, grey, deflate, filters a row, not interlaced
_UNFILTERED = 0  # the first byte of each row


def write_png(path: Path, pixels: UInt8[np.ndarray, "rows columns"]) -> None:
    """Writes a picture; 0 is black, 255 white."""
    rows, columns = pixels.shape
    scanlines = np.pad(pixels, ((0, 0), (1, 0)), constant_values=_UNFILTERED).tobytes()
    header = struct.pack(">II", columns, rows) + _GREY_8_BIT
    chunks = _chunk(b"IHDR", header), _chunk(b"IDAT", zlib.compress(scanlines, 9)), _chunk(b"IEND", b"")
    path.write_bytes(_SIGNATURE + b"".join(chunks))


def _chunk(kind: bytes, contents: bytes) -> bytes:
    return struct.pack(">I", len(contents)) + kind + contents + struct.pack(">I", zlib.crc32(kind + contents))
