"""JPEG streams as rows of marker segments: taken apart and put together, never decoded (T.81, B).

In a TIFF a stream may be abbreviated: its quantisation and Huffman tables stand in a stream of
their own, tag 347, and count for every tile of the directory.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from wsicodec.errors import FormatError

_SOI, _EOI, _SOS, _COM, _APP0, _APP14, _APP15 = 0xD8, 0xD9, 0xDA, 0xFE, 0xE0, 0xEE, 0xEF
_BARE = (0x01, *range(0xD0, 0xD8))  # markers without a length: TEM and the restarts
_MARKER_IN_SCAN = re.compile(rb"\xff(?:[^\x00\xd0-\xd7\xff]|\Z)")
_FILL = re.compile(rb"\xff+")
START, END = b"\xff\xd8", b"\xff\xd9"
_JFIF_BYTES = 18  # the whole segment of a JFIF header without thumbnail

ADOBE_RGB = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x00"
"""Adobe's APP14, which says that the three components are red, green and blue."""


def segments(stream: bytes) -> Iterator[tuple[int, int, int]]:
    """(marker, start, end) of each segment behind SOI, without fill bytes before it.

    A segment's payload starts four bytes behind ``start``; a scan's data belong to its segment.

    EOI comes last where there is one; bytes behind it belong to no segment. Raises FormatError for
    bytes that are no markers, or a segment that is longer than the stream.
    """
    if stream[:2] != START:
        raise FormatError(f"JPEG stream starts with {stream[:2].hex(' ') or 'nothing'}, not ff d8")
    position = 2
    while position < len(stream):
        position = behind_fill(stream, position)
        if stream[position] != 0xFF or position + 1 >= len(stream):
            raise FormatError(f"JPEG stream has no marker at byte {position}")
        start, marker = position, stream[position + 1]
        position += 2
        if marker == _EOI:
            yield marker, start, position
            return
        if marker not in _BARE:
            length = int.from_bytes(stream[position : position + 2])
            position += length
            if length < 2 or position > len(stream):
                raise FormatError(f"JPEG segment ff {marker:02x} at byte {start} is cut short")
            if marker == _SOS:
                position = end_of_scan(stream, position)
        yield marker, start, position


def end_of_scan(stream: bytes, position: int) -> int:
    """Where entropy-coded data end: at the next marker that is neither stuffing nor a restart."""
    found = _MARKER_IN_SCAN.search(stream, position)
    return found.start() if found else len(stream)


def behind_fill(stream: bytes, position: int) -> int:
    """The last of several ff: any number of them may stand before a marker."""
    found = _FILL.match(stream, position)
    return found.end() - 1 if found else position


def without_metadata(stream: bytes) -> bytes:
    """The stream without comments, APPn segments and bytes behind its end; the same pixels.

    EXIF, XMP, colour profiles and embedded thumbnails live there. What JFIF and Adobe say of the
    colours stays. Raises FormatError for a stream that cannot be taken apart.
    """
    kept = [START]
    for marker, start, end in segments(stream):
        body = stream[start + 4 : end]
        if marker == _APP0 and body[:5] == b"JFIF\0" and end - start >= _JFIF_BYTES:
            # its thumbnail is a picture of its own: the header says 0 x 0 instead
            kept.append(b"\xff\xe0\x00\x10" + body[:12] + b"\0\0")
        elif marker == _APP14 and body[:5] == b"Adobe" and len(body) >= 12:
            kept.append(b"\xff\xee\x00\x0e" + body[:12])
        elif marker != _COM and not _APP0 <= marker <= _APP15:
            kept.append(stream[start:end])
    return b"".join(kept)


def with_tables(tables: bytes | None, stream: bytes, head: bytes = b"") -> bytes:
    """One stream that needs no tables from elsewhere; head: segments to insert behind SOI.

    tables: may lack their end marker, as those of real files do, or have bytes behind it.
    Raises FormatError where one of the two is not framed as a JPEG stream.
    """
    if stream[:2] != START:
        raise FormatError("JPEG stream does not start with ff d8")
    return START + head + (b"" if tables is None else _between(tables)) + stream[2:]


def _between(tables: bytes) -> bytes:
    """The segments of a stream of tables, without SOI and EOI."""
    if tables[:2] != START or len(tables) < 4:
        raise FormatError("JPEG tables are not framed by ff d8 and ff d9")
    if tables[-2:] == END:
        return tables[2:-2]
    end = 2
    for marker, _, behind in segments(tables):
        if marker != _EOI:
            end = behind
    return tables[2:end]


def without_tables(tables: bytes | None, whole: bytes, head: bytes = b"") -> bytes:
    """The inverse of ``with_tables``. Raises FormatError where ``whole`` is not made by it."""
    start = with_tables(tables, START, head)
    if not whole.startswith(start):
        raise FormatError("JPEG stream does not begin with the tables of its directory")
    return START + whole[len(start) :]


def app0_names(stream: bytes) -> list[bytes]:
    """First five bytes of the payload of each APP0 segment before the first scan."""
    names = []
    for marker, start, _ in segments(stream):
        if marker == _SOS:
            break
        if marker == _APP0:
            names.append(stream[start + 4 : start + 9])
    return names


def jpeg_colours(stream: bytes) -> tuple[bool, tuple[int, int]]:
    """(is YCbCr, (horizontal, vertical) chroma subsampling) of a three-channel JPEG stream.

    Raises FormatError where the headers end early or hold no frame of three components.
    """
    adobe, jfif = None, False
    for marker, start, end in segments(stream):
        body = stream[start + 4 : end]
        if marker == _APP0 and body[:4] == b"JFIF":
            jfif = True
        elif marker == _APP14 and body[:5] == b"Adobe" and len(body) >= 12:
            adobe = body[11]
        elif marker in (0xC0, 0xC1, 0xC2):
            if len(body) < 15 or body[5] != 3:
                break
            factors = [body[7 + 3 * component] for component in range(3)]
            identifiers = [body[6 + 3 * component] for component in range(3)]
            luma = factors[0] >> 4, factors[0] & 15
            # T.871 and Adobe's technical note 5116: JFIF is YCbCr; else Adobe's flag; else names
            if not jfif and (adobe == 0 or (adobe is None and identifiers == [82, 71, 66])):
                return False, (1, 1)
            return True, (luma[0] // max(1, factors[1] >> 4), luma[1] // max(1, factors[1] & 15))
        elif marker == _SOS:
            break
    raise FormatError("JPEG stream has no frame of three components")
