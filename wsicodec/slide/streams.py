"""How large an image a coded stream says it is, before a library allocates memory for it."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

from wsicodec.codec.headers import J2K_MAGIC, JXL_MAGIC, JXL_RATIOS, Box, boxes
from wsicodec.errors import FormatError
from wsicodec.slide.jpegstream import START

# as libjpeg searches: over stray bytes, stuffing and fill, and markers without a length
_JPEG_MARKER = re.compile(rb"\xff[\x02-\xcf\xd9-\xfe]")
_JXL_HEAD = 16  # bytes that hold the size
_MAX_STEPS = 4096  # segments or boxes before the header

_JPEG = (6, 7)
_JPEG2000 = (33003, 33004, 33005, 34712)
_WEBP = (34927, 50001)
_PNG = (34933,)
_JPEGXL = (50002, 52546)


def declared_size(data: bytes, compression: int) -> tuple[int, int, int] | None:
    """(height, width, channels) by the stream's own header; channels 0 where it is not told.

    compression: TIFF tag 259. None where streams of that kind have no such header (``tells_size``
    is false), and where this one has none, or a broken one: a library may find one all the same.
    """
    try:
        if compression in _JPEG:
            return _jpeg(data)
        if compression in _JPEG2000:
            return _jpeg2000(data)
        if compression in _WEBP:
            return _webp(data)
        if compression in _PNG:
            return _png(data)
        if compression in _JPEGXL:
            return _jpegxl(data)
    except (FormatError, IndexError):
        pass
    return None


def tells_size(compression: int) -> bool:
    """True for a TIFF compression whose streams say how large their image is."""
    return compression in (*_JPEG, *_JPEG2000, *_WEBP, *_PNG, *_JPEGXL)


def _jpeg(data: bytes) -> tuple[int, int, int] | None:
    if not data.startswith(START):
        return None
    position = 2
    for _ in range(_MAX_STEPS):
        found = _JPEG_MARKER.search(data, position)
        if found is None:
            break
        position, marker = found.end(), data[found.end() - 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return _big(data, position + 3, 2), _big(data, position + 5, 2), data[position + 7]
        if marker in (0xD9, 0xDA):
            break
        position += _big(data, position, 2)
    return None


def _first_boxes(data: bytes) -> Iterator[Box]:
    return itertools.islice(boxes(data, "stream"), _MAX_STEPS)


def _jpeg2000(data: bytes) -> tuple[int, int, int] | None:
    start = 0
    if not data.startswith(J2K_MAGIC):
        start = next((box.start for box in _first_boxes(data) if box.kind == b"jp2c"), len(data))
        if not data.startswith(J2K_MAGIC, start):
            return None
    right, bottom, left, top = (_big(data, start + 8 + 4 * i, 4) for i in range(4))
    if right < left or bottom < top:
        return None
    return bottom - top, right - left, _big(data, start + 40, 2)


def _png(data: bytes) -> tuple[int, int, int] | None:
    if data[12:16] != b"IHDR":
        return None
    return _big(data, 20, 4), _big(data, 16, 4), 0


def _webp(data: bytes) -> tuple[int, int, int] | None:
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP":
        return None
    kind = data[12:16]
    if kind == b"VP8X":
        return _little(data, 27, 3) + 1, _little(data, 24, 3) + 1, 4
    if kind == b"VP8 ":
        return _little(data, 28, 2) & 0x3FFF, _little(data, 26, 2) & 0x3FFF, 3
    if kind == b"VP8L":
        bits = _little(data, 21, 4)
        return (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1, 4
    return None


def _jpegxl(data: bytes) -> tuple[int, int, int] | None:
    head = data[:_JXL_HEAD]
    if not head.startswith(JXL_MAGIC):
        # in a container: the box of the codestream, or of its parts, each behind a counter
        head = b""
        for box in _first_boxes(data):
            if box.kind in (b"jxlc", b"jxlp"):
                start = box.start + (4 if box.kind == b"jxlp" else 0)
                head += data[start : min(box.end, start + _JXL_HEAD)]
            if len(head) >= _JXL_HEAD:
                break
        if not head.startswith(JXL_MAGIC):
            return None
    bits = int.from_bytes(head[2:], "little")

    def read(count: int) -> int:
        nonlocal bits
        value = bits & (1 << count) - 1
        bits >>= count
        return value

    def side(by_eight: int) -> int:
        if by_eight:
            return 8 * (read(5) + 1)
        return read((9, 13, 18, 30)[read(2)]) + 1

    by_eight = read(1)
    height = side(by_eight)
    ratio = read(3)
    if ratio:
        over, under = JXL_RATIOS[ratio - 1]
        return height, height * over // under, 0
    return height, side(by_eight), 0


def _big(data: bytes, start: int, count: int) -> int:
    if start + count > len(data):
        raise IndexError
    return int.from_bytes(data[start : start + count], "big")


def _little(data: bytes, start: int, count: int) -> int:
    if start + count > len(data) or count < 0:
        raise IndexError
    return int.from_bytes(data[start : start + count], "little")
