"""One TIFF directory as a grid of segments, each decoded to 8-bit RGB.

A segment is a tile, a strip, or a part of an uncompressed strip: such strips are often a whole
image, and reading a few rows of one needs no more than these rows.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from wsicodec.errors import LimitError, SlideError, UnsupportedError, WsicodecError

Image = npt.NDArray[np.uint8]

MAX_SEGMENT_BYTES = 512 * 2**20
"""A tile or strip of more decoded bytes is refused: one would outgrow any sensible cache."""

_ROWS_BYTES = 4 * 2**20  # decoded size of the parts that uncompressed strips are read in

# TIFF tag 259 -> name in SlideInfo; others are shown as tifffile names them
_COMPRESSIONS = {
    1: "none",
    5: "lzw",
    6: "ojpeg",
    7: "jpeg",
    8: "deflate",
    32946: "deflate",
    33003: "jpeg2000",
    33004: "jpeg2000",
    33005: "jpeg2000",
    34712: "jpeg2000",
    34925: "lzma",
    50000: "zstd",
    50001: "webp",
    50002: "jpegxl",
    52546: "jpegxl",
}
_JPEG = 7
_APERIO_YCBCR = 33003
_PHOTOMETRICS = {
    "minisblack": "grey",
    "miniswhite": "grey",
    "palette": "indexed by a palette",
    "separated": "CMYK",
}
_CHANNELS = {1: "one channel", 2: "two channels", 4: "four channels, like RGBA"}


class SlideFile:
    """Reads byte ranges of a file, from many threads at once."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self._lock = threading.Lock()
        self.size = os.fstat(self._file.fileno()).st_size

    def read(self, offset: int, count: int, where: str) -> bytes:
        """Exactly ``count`` bytes, or SlideError naming ``where``."""
        if offset < 0 or count < 0 or offset + count > self.size:
            raise SlideError(
                f"{where}: its bytes {offset} ... {offset + count} lie beyond the file's end at "
                f"{self.size}: the file was cut short or is damaged"
            )
        try:
            if hasattr(os, "pread"):
                data = os.pread(self._file.fileno(), count, offset)
                while 0 < len(data) < count:  # a read of more than 2 GiB comes in pieces
                    more = os.pread(self._file.fileno(), count - len(data), offset + len(data))
                    data = data + more if more else b""
            else:
                with self._lock:
                    self._file.seek(offset)
                    data = self._file.read(count)
        except OSError as error:
            raise SlideError(f"{where}: cannot be read: {error.strerror or error}") from error
        if len(data) != count:
            raise SlideError(f"{where}: the file became shorter while it was read")
        return data

    def close(self) -> None:
        self._file.close()


class Page:
    """A TIFF directory of 8-bit RGB pixels.

    where: file and level, for messages. segment_height, segment_width: pixels of one segment.

    Raises UnsupportedError for other pixels, SlideError for a broken directory, LimitError for
    segments above MAX_SEGMENT_BYTES.
    """

    def __init__(self, page: Any, file: SlideFile, where: str) -> None:
        self.where = where
        self.tags = page.tags
        self.height, self.width = int(page.imagelength), int(page.imagewidth)
        self.compression = compression_name(page)
        self.photometric = self._check_pixels(page)
        self._file = file
        self._offsets, self._counts = page.dataoffsets, page.databytecounts
        self._planes = 3 if int(page.planarconfig) != 1 else 1
        self._aperio_ycbcr = int(page.compression) == _APERIO_YCBCR
        self._jpeg = (
            {"jpegtables": page.jpegtables, "jpegheader": page.jpegheader}
            if int(page.compression) == _JPEG
            else {}
        )
        if page.is_tiled:
            self.segment_height, self.segment_width = int(page.tilelength), int(page.tilewidth)
        else:
            self.segment_height = min(int(page.rowsperstrip), self.height)
            self.segment_width = self.width
        if self.segment_height < 1 or self.segment_width < 1:
            raise SlideError(f"{where}: its tiles have no size")
        self._stored_height = self.segment_height
        self._plain = _is_plain(page)
        if self._plain:
            self.segment_height = _part_height(self.height, self.width, self._stored_height)
        if self.segment_height * self.segment_width * 3 > MAX_SEGMENT_BYTES:
            raise LimitError(
                f"{where}: one {'tile' if page.is_tiled else 'strip'} of {self.segment_height} x "
                f"{self.segment_width} pixels has more than {MAX_SEGMENT_BYTES} bytes: write the "
                "file anew in smaller tiles"
            )
        self._columns = -(-self.width // self.segment_width)
        self._stored_rows = -(-self.height // self._stored_height)
        stored = self._stored_rows * self._columns * self._planes
        if min(len(self._offsets), len(self._counts)) < stored:
            raise SlideError(
                f"{where}: has {stored} tiles or strips, but places for {len(self._offsets)}"
            )
        # tifffile builds this function on first use; threads must find it ready
        self._decode = page.decode

    def _check_pixels(self, page: Any) -> str:
        """The photometric interpretation, ``rgb`` or ``ycbcr``; refuses all other pixels."""
        photometric = str(getattr(page.photometric, "name", page.photometric)).lower()
        samples = int(page.samplesperpixel)
        if self.height < 1 or self.width < 1:
            raise SlideError(f"{self.where}: the image has no pixels")
        if samples != 3 or photometric not in ("rgb", "ycbcr"):
            raise UnsupportedError(
                f"{self.where}: pixels are {_PHOTOMETRICS.get(photometric, photometric)} with "
                f"{_CHANNELS.get(samples, f'{samples} channels')}; wsicodec reads RGB "
                "(brightfield) slides"
            )
        if page.bitspersample != 8 or page.dtype != np.uint8:
            raise UnsupportedError(
                f"{self.where}: samples are {page.dtype} of {page.bitspersample} bits; wsicodec "
                "reads 8-bit RGB"
            )
        if int(page.imagedepth) != 1:
            raise UnsupportedError(f"{self.where}: image is a volume; wsicodec reads planes")
        if photometric == "ycbcr" and int(page.compression) not in (_JPEG, _APERIO_YCBCR):
            # tifffile hands such samples out unconverted, in wrong colours
            raise UnsupportedError(
                f"{self.where}: YCbCr pixels outside JPEG ({self.compression}) are not read"
            )
        return photometric

    def decode(self, row: int, column: int) -> Image:
        """Pixels of a segment, uint8 (rows, columns, 3), cropped to the image.

        Raises SlideError, or the error of our own codec, naming level, tile and reason.
        """
        where = f"{self.where}: tile at row {row}, column {column}"
        height = min(self.segment_height, self.height - row * self.segment_height)
        width = min(self.segment_width, self.width - column * self.segment_width)
        if self._plain:
            return np.frombuffer(self.read(row, column), np.uint8).reshape(height, width, 3)
        planes = [self._decode_plane(row, column, plane, where) for plane in range(self._planes)]
        image = planes[0] if len(planes) == 1 else np.concatenate(planes, axis=2)
        if image.shape[0] < height or image.shape[1] < width or image.shape[2] != 3:
            raise SlideError(f"{where}: holds {image.shape} pixels, not ({height}, {width}, 3)")
        image = image[:height, :width]
        return _rgb_of_ycbcr(image) if self._aperio_ycbcr else np.ascontiguousarray(image)

    def _decode_plane(self, row: int, column: int, plane: int, where: str) -> Image:
        index = self._index(row, column, plane)
        data = self._read_stored(index, where)
        if not data:
            # tifffile would make it black; what scanners leave out is glass
            shape = (self.segment_height, self.segment_width, 3 // self._planes)
            return np.full(shape, 255, np.uint8)
        try:
            image = np.asarray(self._decode(data, index, **self._jpeg)[0])
        except WsicodecError as error:
            raise type(error)(f"{where}: {error}") from error
        except Exception as error:
            raise SlideError(f"{where}: cannot be decoded: {error or type(error)}") from error
        if image.dtype != np.uint8 or image.ndim < 3:
            raise SlideError(f"{where}: holds {image.dtype} samples of shape {image.shape}")
        return image.reshape(image.shape[-3:])

    def read(self, row: int, column: int) -> bytes:
        """Stored bytes of a segment, of all its planes one after the other; empty if left out."""
        where = f"{self.where}: tile at row {row}, column {column}"
        if not self._plain:
            return b"".join(
                self._read_stored(self._index(row, column, plane), where)
                for plane in range(self._planes)
            )
        first = row * self.segment_height
        last = min(first + self.segment_height, self.height)
        strip, within = divmod(first, self._stored_height)
        line = self.width * 3
        offset = int(self._offsets[strip]) + within * line
        return self._file.read(offset, (last - first) * line, where)

    def _read_stored(self, index: int, where: str) -> bytes:
        count = int(self._counts[index])
        return self._file.read(int(self._offsets[index]), count, where) if count else b""

    def _index(self, row: int, column: int, plane: int) -> int:
        return (plane * self._stored_rows + row) * self._columns + column


def compression_name(page: Any) -> str:
    """Name of a tifffile page's compression, ``wsicodec`` for our own tag."""
    from wsicodec.plugins.tifffile import TIFF_COMPRESSION_TAG

    code = int(page.compression)
    if code == TIFF_COMPRESSION_TAG:
        return "wsicodec"
    return _COMPRESSIONS.get(code) or str(getattr(page.compression, "name", code)).lower()


@contextlib.contextmanager
def named(what: str) -> Iterator[None]:
    """What a library raises on a stranger's file becomes a SlideError that starts with ``what``."""
    try:
        yield
    except WsicodecError:
        raise
    except Exception as error:
        raise SlideError(f"{what}: {error or type(error).__name__}") from error


def _is_plain(page: Any) -> bool:
    """True when the bytes of strips are the pixels, row by row."""
    return (
        not page.is_tiled
        and int(page.compression) == 1
        and int(page.planarconfig) == 1
        and int(page.predictor) == 1
        and int(page.fillorder) == 1
        and all(page.databytecounts)
    )


def _part_height(height: int, width: int, strip_height: int) -> int:
    """Rows to read at once of an uncompressed strip; parts must not straddle two strips."""
    rows = max(1, _ROWS_BYTES // (width * 3))
    if rows >= strip_height:
        return strip_height
    if strip_height >= height:
        return rows
    return next(n for n in range(rows, 0, -1) if strip_height % n == 0)


def _rgb_of_ycbcr(image: Image) -> Image:
    """Full-range BT.601, as in JFIF; Aperio's 33003 streams hold YCbCr without saying so."""
    y, cb, cr = (image[..., channel].astype(np.float32) for channel in range(3))
    rgb: npt.NDArray[np.float32] = np.stack(
        [
            y + 1.402 * (cr - 128),
            y - 0.344136 * (cb - 128) - 0.714136 * (cr - 128),
            y + 1.772 * (cb - 128),
        ],
        axis=-1,
    )
    return np.clip(np.rint(rgb), 0, 255).astype(np.uint8)
