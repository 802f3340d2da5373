"""How large an image a coded stream says it is, before a library allocates memory for it."""

from __future__ import annotations

from wsicodec.slide.jpegstream import behind_fill

_J2K_MAGIC = b"\xff\x4f\xff\x51"
_JXL_MAGIC = b"\xff\x0a"
_JXL_RATIOS = ((1, 1), (12, 10), (4, 3), (3, 2), (16, 9), (5, 4), (2, 1))
_HEAD = 4096  # boxes before a JPEG-2000 codestream are searched this far

_JPEG = (6, 7)
_JPEG2000 = (33003, 33004, 33005, 34712)
_WEBP = (34927, 50001)
_PNG = (34933,)
_JPEGXL = (50002, 52546)


def declared_size(data: bytes, compression: int) -> tuple[int, int, int] | None:
    """(height, width, channels) by the stream's own header; channels 0 where it is not told.

    compression: TIFF tag 259. None where the stream has no such header, or a broken one, which
    its decoder will say.
    """
    try:
        if compression in _JPEG:
            return _jpeg(data)
        if compression in _JPEG2000:
            return _jpeg2000(data)
        if compression in _WEBP:
            return _webp(data)
        if compression in _PNG:
            return _big(data, 20, 4), _big(data, 16, 4), 0
        if compression in _JPEGXL:
            return _jpegxl(data)
    except IndexError:
        pass
    return None


def _jpeg(data: bytes) -> tuple[int, int, int] | None:
    position = behind_fill(data, 2)
    while data[position] == 0xFF:
        marker = data[position + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return _big(data, position + 5, 2), _big(data, position + 7, 2), data[position + 9]
        if marker == 0xDA:
            break
        position = behind_fill(data, position + 2 + _big(data, position + 2, 2))
    return None


def _jpeg2000(data: bytes) -> tuple[int, int, int] | None:
    start = data.find(_J2K_MAGIC, 0, _HEAD)
    if start < 0:
        return None
    right, bottom, left, top = (_big(data, start + 8 + 4 * i, 4) for i in range(4))
    return bottom - top, right - left, _big(data, start + 40, 2)


def _webp(data: bytes) -> tuple[int, int, int] | None:
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
    start = 0
    if not data.startswith(_JXL_MAGIC):
        # in a container: the box of the codestream, or of its first part behind a counter
        whole, part = data.find(b"jxlc"), data.find(b"jxlp")
        start = whole + 4 if whole >= 0 else part + 8
        if max(whole, part) < 0 or not data.startswith(_JXL_MAGIC, start):
            return None
    bits = _little(data, start + 2, min(16, len(data) - start - 2))

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
        over, under = _JXL_RATIOS[ratio - 1]
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
