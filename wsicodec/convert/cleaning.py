"""Takes out of compressed tiles what is no picture: comments, EXIF, XMP. Their pixels stay."""

from __future__ import annotations

from wsicodec.errors import FormatError, UnsupportedError
from wsicodec.slide.jpegstream import without_metadata

_JPEG = 7
_JPEG2000 = (33003, 33004, 33005, 34712)
_WEBP = (34927, 50001)
_JPEGXL = (50002, 52546)
_NO_METADATA = (
    1,
    5,
    8,
    32773,
    32946,
    34925,
    34926,
    50000,
    60642,
)  # nothing but samples, and our own

_JXL_CONTAINER = b"\0\0\0\x0cJXL "
_JXL_PICTURE = (b"JXL ", b"ftyp", b"jxll", b"jxlc", b"jxlp")
_WEBP_FLAGS, _WEBP_METADATA = 20, 0x0C  # place of the flags in VP8X; those of EXIF and XMP


def cleaned(compression: int, stream: bytes) -> bytes:
    """The stream without metadata. compression: value of TIFF tag 259.

    Raises FormatError for a stream that cannot be taken apart, UnsupportedError where it holds
    metadata that this does not know how to remove.
    """
    if not stream or compression in _NO_METADATA:
        return stream
    if compression == _JPEG:
        return without_metadata(stream)
    if compression in _JPEG2000 and stream[:2] == b"\xff\x4f":
        return _without_comments(stream)
    if compression in _WEBP and stream[:4] == b"RIFF":
        if len(stream) <= _WEBP_FLAGS:
            raise FormatError("WebP stream ends before its first chunk does")
        if stream[12:16] != b"VP8X" or not stream[_WEBP_FLAGS] & _WEBP_METADATA:
            return stream
    elif compression in _JPEGXL and (
        stream[:2] == b"\xff\x0a"
        or (stream.startswith(_JXL_CONTAINER) and set(_boxes(stream)) <= set(_JXL_PICTURE))
    ):
        return stream
    raise UnsupportedError(
        f"metadata cannot be removed from a tile of compression {compression} (starts with "
        f"{stream[:12].hex(' ')}) as it is; convert it with a codec instead"
    )


def _without_comments(stream: bytes) -> bytes:
    """A JPEG-2000 codestream without the COM segments of its main header (T.800, A.9.2)."""
    kept, position = [stream[:2]], 2
    while stream[position : position + 2] != b"\xff\x90":  # SOT: the first tile-part
        length = int.from_bytes(stream[position + 2 : position + 4])
        end = position + 2 + length
        if stream[position : position + 1] != b"\xff" or length < 2 or end > len(stream):
            raise FormatError(f"JPEG-2000 header is broken at byte {position}")
        if stream[position + 1] != 0x64:
            kept.append(stream[position:end])
        position = end
    return b"".join([*kept, stream[position:]])


def _boxes(stream: bytes) -> list[bytes]:
    """Types of the boxes of a JPEG-XL container."""
    names, position = [], 0
    while position < len(stream):
        length = int.from_bytes(stream[position : position + 4])
        names.append(stream[position + 4 : position + 8])
        if length == 1:
            length = int.from_bytes(stream[position + 8 : position + 16])
        if length == 0:
            break
        if length < 8:
            raise FormatError(f"JPEG-XL box at byte {position} is broken")
        position += length
    return names
