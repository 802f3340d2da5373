"""JPEG streams coded anew as JPEG XL, a fifth to a third smaller, that come back bit by bit.

JPEG XL codes the very coefficients of a JPEG, and a box beside them what else its bytes need
(ISO/IEC 18181-2, "jbrd"). A tile of mode ``transcoded`` is decoded by way of that JPEG: what libjxl
itself makes of such a file differs from libjpeg's pixels by 1 of 255 here and there.
"""

from __future__ import annotations

from typing import Any

from wsicodec.bitstream import Mode, Tile
from wsicodec.codec.headers import jpeg_size, transcoded_size
from wsicodec.codec.reference import INSTALL
from wsicodec.errors import FormatError, RuntimeMissingError, WsicodecError

_SPARE_BYTES = 2**16


def transcode(stream: bytes) -> Tile | None:
    """The tile of a whole JPEG stream, 8-bit RGB or YCbCr, or None where there is none.

    There is none for streams that wsicodec's JPEG does not read, or JPEG XL does not give back bit
    by bit. Raises RuntimeMissingError.
    """
    library = _imagecodecs()
    try:
        height, width = jpeg_size(stream, whole=True)
        packed = bytes(library.jpegxl_encode_jpeg(stream, numthreads=1))
        tile = Tile(Mode.TRANSCODED, height, width, packed)
        return tile if jpeg_of(tile) == stream else None
    except (WsicodecError, RuntimeError, ValueError):
        return None  # whatever the reason, the stream stays as good as it was


def jpeg_of(tile: Tile) -> bytes:
    """The JPEG stream of a tile of mode ``transcoded``, as it once was.

    At most twice the pixels' bytes and 64 KiB: no JPEG of any use is longer. Raises FormatError,
    LimitError, RuntimeMissingError.
    """
    size = transcoded_size(tile.payload)
    if size != (tile.height, tile.width):
        raise FormatError(
            f"tile of {tile.width} x {tile.height} pixels holds a transcoded JPEG of "
            f"{size[1]} x {size[0]}"
        )
    return jpeg_of_container(tile.payload)


def jpeg_of_container(data: bytes, *, metadata: bool = False, more: int = 0) -> bytes:
    """The JPEG stream of a JPEG XL container, at most twice its pixels' bytes and 64 KiB.

    metadata: boxes of EXIF and XMP may be there. more: bytes that are allowed beside those.
    Raises as ``jpeg_of`` does.
    """
    height, width = transcoded_size(data, metadata=metadata)
    limit = 2 * 3 * height * width + _SPARE_BYTES + more
    library = _imagecodecs()
    try:
        return bytes(library.jpegxl_decode_jpeg(data, numthreads=1, out=limit))
    except MemoryError:
        raise
    except Exception as error:
        raise FormatError(f"transcoded JPEG does not turn back into JPEG: {error}") from error


def _imagecodecs() -> Any:
    try:
        import imagecodecs
    except ImportError as error:
        raise RuntimeMissingError(
            f"transcoded JPEG needs imagecodecs ({error}): {INSTALL}"
        ) from error
    if not imagecodecs.JPEGXL.available:
        raise RuntimeMissingError(
            f"imagecodecs {imagecodecs.__version__} was built without JPEG XL: {INSTALL}"
        )
    return imagecodecs
