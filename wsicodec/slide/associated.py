"""Images beside a pyramid in a TIFF (label, macro, thumbnail ...), as RGB whatever they are.

They are small, and read whole; a directory that cannot be read spoils nothing but itself.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from wsicodec.errors import LimitError, SlideError, UnsupportedError
from wsicodec.slide.pages import (
    SlideFile,
    check_compression,
    check_declared,
    check_stream,
    compression_name,
    named,
    rgb_of_ycbcr,
    stored_layout,
)
from wsicodec.slide.protocol import AssociatedImage, Image, StoredImage

MAX_ASSOCIATED_BYTES = 256 * 2**20
"""An image beside the pyramid of more bytes, decoded or stored, is refused: it would be a slide."""

_MINISWHITE, _MINISBLACK, _RGB, _PALETTE, _YCBCR = 0, 1, 2, 3, 6
_JPEG = 7
_FAX = (2, 3, 4)
_PREMULTIPLIED, _ALPHA = 1, 2  # values of ExtraSamples

Samples = npt.NDArray[Any]


def read_page(
    page: Any, file: SlideFile, name: str, where: str, *, strict: bool = False
) -> AssociatedImage:
    """The image of a tifffile page, decoded, and as it is stored where that can be copied.

    where: file and image, for messages. strict: as ``check_stream`` has it.
    Raises LimitError above MAX_ASSOCIATED_BYTES, UnsupportedError for pixels that cannot be shown
    as RGB, SlideError for damage.
    """
    with named(where):
        if int(page.compression) not in _FAX:
            check_compression(page, where)
        segments = _segments(page, file, where)
        pixels = _rgb(_decode(page, segments, where, strict=strict), page, where)
        return AssociatedImage(name, pixels, _stored(page, file, segments, where))


def _segments(page: Any, file: SlideFile, where: str) -> tuple[bytes, ...]:
    """Stored bytes of all tiles or strips; empty where the file has none."""
    places = list(zip(page.dataoffsets, page.databytecounts, strict=False))
    height, width = int(page.imagelength), int(page.imagewidth)
    if height < 1 or width < 1:
        raise SlideError(f"{where}: has no pixels")
    item = 1 if page.dtype is None else max(1, page.dtype.itemsize)
    decoded = height * width * max(3, int(page.samplesperpixel) * item)
    # a tile may be larger than the image: it is decoded whole
    tile = int(page.tilelength) * int(page.tilewidth) * 3 if page.is_tiled else 0
    stored = sum(int(count) for _, count in places)
    if max(decoded, tile, stored) > MAX_ASSOCIATED_BYTES:
        raise LimitError(
            f"{where}: {width} x {height} pixels in {stored} bytes need more than "
            f"{MAX_ASSOCIATED_BYTES} bytes"
        )
    return tuple(
        file.read(int(offset), int(count), where) if count else b"" for offset, count in places
    )


def _decode(page: Any, segments: tuple[bytes, ...], where: str, *, strict: bool) -> Samples:
    """Samples of the page, (rows, columns, channels)."""
    if page.dtype is None or int(page.imagedepth) != 1:
        raise UnsupportedError(f"{where}: holds no plane of samples that can be shown")
    channels = int(page.samplesperpixel)
    tables = (
        {"jpegtables": page.jpegtables, "jpegheader": page.jpegheader}
        if int(page.compression) == _JPEG
        else {}
    )
    height, width = int(page.imagelength), int(page.imagewidth)
    tall, wide = (page.tilelength, page.tilewidth) if page.is_tiled else (page.rowsperstrip, width)
    _check_samples(page, where)
    # what a file leaves out is white, as glass is
    white = 0 if page.photometric == _MINISWHITE else 2 ** int(page.bitspersample) - 1
    image = np.full((height, width, channels), white, page.dtype)
    planes = 1 if int(page.planarconfig) == 1 else channels
    wanted = -(-height // max(1, int(tall))) * -(-width // max(1, int(wide))) * planes
    if len(segments) < wanted:
        raise SlideError(f"{where}: has places for {len(segments)} of {wanted} tiles or strips")
    for index, data in enumerate(segments[:wanted]):
        if not data:
            continue
        check_declared(data, int(page.compression), int(tall), int(wide), where)
        check_stream(data, int(page.compression), page.jpegtables, where, strict=strict)
        segment, place, _ = page.decode(data, index, **tables)
        plane, _, y, x, _ = place
        part = np.asarray(segment)
        part = part.reshape(part.shape[-3:])[: height - y, : width - x]
        target = image if planes == 1 else image[..., plane : plane + 1]
        target[y : y + part.shape[0], x : x + part.shape[1]] = part
    return image


def _check_samples(page: Any, where: str) -> None:
    bits = page.bitspersample
    if page.dtype not in (np.bool_, np.uint8, np.uint16) or not isinstance(bits, int):
        raise UnsupportedError(
            f"{where}: samples are {page.dtype} of {bits} bits; 1 to 16 bits are shown"
        )


def _rgb(samples: Samples, page: Any, where: str) -> Image:
    """Grey, palette, RGB, YCbCr, with or without alpha, of 1, 8 or 16 bits, as 8-bit RGB."""
    photometric, channels = int(page.photometric), samples.shape[2]
    if photometric == _PALETTE and channels == 1:
        return _by_palette(samples[..., 0], page, where)
    image = _eight_bits(samples, page)
    extra = page.extrasamples[:1]
    if photometric in (_MINISBLACK, _MINISWHITE) and channels <= 2:
        grey = image[..., :1]
        rgb = np.repeat(255 - grey if photometric == _MINISWHITE else grey, 3, axis=2)
    elif photometric in (_RGB, _YCBCR) and channels in (3, 4):
        rgb = image[..., :3]
        # tifffile converts JPEG's YCbCr and no other
        if photometric == _YCBCR and int(page.compression) != _JPEG:
            rgb = rgb_of_ycbcr(rgb)
    else:
        raise UnsupportedError(
            f"{where}: {channels} channels of photometric interpretation {photometric} "
            f"({compression_name(page)}) cannot be shown as RGB"
        )
    if channels in (2, 4) and extra and int(extra[0]) in (_PREMULTIPLIED, _ALPHA):
        rgb = _over_white(rgb, image[..., -1:], premultiplied=int(extra[0]) == _PREMULTIPLIED)
    return np.ascontiguousarray(rgb, np.uint8)


def _eight_bits(samples: Samples, page: Any) -> Image:
    bits = int(page.bitspersample)
    if bits >= 8:
        return np.asarray(samples >> (bits - 8), np.uint8)
    return np.asarray(samples.astype(np.uint16) * 255 // (2**bits - 1), np.uint8)


def _by_palette(indices: Samples, page: Any, where: str) -> Image:
    colours = np.asarray(page.colormap)
    if colours.ndim != 2 or colours.shape[0] != 3 or indices.max(initial=0) >= colours.shape[1]:
        raise SlideError(f"{where}: a pixel has no colour in its palette")
    # 16-bit by the standard; some writers fill in 8-bit values
    scaled = colours >> 8 if colours.max(initial=0) > 255 else colours
    return np.ascontiguousarray(scaled.astype(np.uint8).T[indices.astype(np.intp)])


def _over_white(rgb: Image, alpha: Image, *, premultiplied: bool) -> Image:
    colour = rgb.astype(np.uint32) * (255 if premultiplied else alpha.astype(np.uint32))
    blended = (colour + 255 * (255 - alpha.astype(np.uint32)) + 127) // 255
    return np.asarray(np.minimum(blended, 255), np.uint8)


def _stored(
    page: Any, file: SlideFile, segments: tuple[bytes, ...], where: str
) -> StoredImage | None:
    """The page as it is stored, where that is interleaved 8-bit RGB or YCbCr."""
    if (
        int(page.photometric) not in (_RGB, _YCBCR)
        or int(page.samplesperpixel) != 3
        or page.bitspersample != 8
        or page.dtype != np.uint8
        or int(page.planarconfig) != 1
    ):
        return None
    try:
        layout = stored_layout(page, file, where)
    except UnsupportedError:
        return None
    return StoredImage(**vars(layout), segments=segments)
