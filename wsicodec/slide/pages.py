"""One TIFF directory as a grid of segments, each decoded to 8-bit RGB.

A segment is a tile, a strip, or a part of an uncompressed strip: such strips are often a whole
image, and reading a few rows of one needs no more than these rows.
"""

from __future__ import annotations

import contextlib
import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from wsicodec.errors import FormatError, LimitError, SlideError, UnsupportedError, WsicodecError
from wsicodec.slide import jpegstream
from wsicodec.slide.protocol import Image, StoredLayout
from wsicodec.slide.streams import declared_size, tells_size

MAX_SEGMENT_BYTES = 512 * 2**20
"""A tile or strip of more bytes, decoded or stored, is refused: one would outgrow any cache."""

_ROWS_BYTES = 4 * 2**20  # decoded size of the parts that uncompressed strips are read in

# TIFF tag 259 -> name in SlideInfo; others are shown as tifffile names them
_COMPRESSIONS = {
    1: "none",
    5: "lzw",
    6: "ojpeg",
    7: "jpeg",
    8: "deflate",
    32773: "packbits",
    32946: "deflate",
    33003: "jpeg2000",
    33004: "jpeg2000",
    33005: "jpeg2000",
    34712: "jpeg2000",
    34925: "lzma",
    34926: "zstd",
    34927: "webp",
    34933: "png",
    50000: "zstd",
    50001: "webp",
    50002: "jpegxl",
    52546: "jpegxl",
}
# others would be decoded by libraries that nobody tries on slides
_READ = set(_COMPRESSIONS)
_JPEG = 7
_JPEG2000 = (33003, 33004, 33005, 34712)
_J2K_START = b"\xff\x4f\xff\x51"
_PADDING = 64  # bytes behind a stream's end that are no reason to refuse it; zeros always are none
_BOUND_TO_FILE = (6,)  # old-style JPEG: its tags hold offsets within the file
_YCBCR = 6
_TAG_SUBSAMPLING = 530
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

    where: file and level, for messages. strict: as ``check_stream`` has it. segment_height,
    segment_width: pixels of one segment.

    Raises UnsupportedError for other pixels, SlideError for a broken directory, LimitError for
    segments above MAX_SEGMENT_BYTES.
    """

    def __init__(self, page: Any, file: SlideFile, where: str, *, strict: bool = False) -> None:
        self.where = where
        self._strict = strict
        self.tags = page.tags
        self.height, self.width = int(page.imagelength), int(page.imagewidth)
        self.compression = compression_name(page)
        self._code = int(page.compression)
        self.photometric = self._check_pixels(page)
        self._file = file
        self._offsets = _numbers(page.dataoffsets, where)
        self._counts = _numbers(page.databytecounts, where)
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
        self._page = page

    def layout(self) -> StoredLayout:
        """What another TIFF must say to hold these segments, as ``read`` hands them out.

        Raises UnsupportedError where the segments mean nothing outside this file.
        """
        with named(f"{self.where}: its directory is damaged"):
            return stored_layout(self._page, self._file, self.where, self.segment_height)

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
        check_compression(page, self.where)
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
        if not any(self._counts[self._index(row, column, n)] for n in range(self._planes)):
            # tifffile would make it black; what scanners leave out is glass
            return np.full((height, width, 3), 255, np.uint8)
        planes = [self._decode_plane(row, column, plane, where) for plane in range(self._planes)]
        image = planes[0] if len(planes) == 1 else np.concatenate(planes, axis=2)
        if image.shape[0] < height or image.shape[1] < width or image.shape[2] != 3:
            raise SlideError(f"{where}: holds {image.shape} pixels, not ({height}, {width}, 3)")
        image = image[:height, :width]
        return rgb_of_ycbcr(image) if self._aperio_ycbcr else np.ascontiguousarray(image)

    def _decode_plane(self, row: int, column: int, plane: int, where: str) -> Image:
        index = self._index(row, column, plane)
        data = self._read_stored(index, where)
        if not data:
            shape = (self.segment_height, self.segment_width, 3 // self._planes)
            return np.full(shape, 255, np.uint8)
        try:
            check_declared(data, self._code, self._stored_height, self.segment_width, where)
            tables = self._jpeg.get("jpegtables")
            check_stream(data, self._code, tables, where, strict=self._strict)
            image = np.asarray(self._decode(data, index, **self._jpeg)[0])
        except WsicodecError as error:
            if str(error).startswith(where):
                raise
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
        if within * line + (last - first) * line > int(self._counts[strip]):
            raise SlideError(
                f"{where}: its strip has {self._counts[strip]} bytes, too few for its pixels: the "
                "file is damaged"
            )
        return self._file.read(offset, (last - first) * line, where)

    def _read_stored(self, index: int, where: str) -> bytes:
        count = int(self._counts[index])
        if count > MAX_SEGMENT_BYTES:
            raise LimitError(f"{where}: {count} bytes exceed {MAX_SEGMENT_BYTES}")
        return self._file.read(int(self._offsets[index]), count, where) if count else b""

    def _index(self, row: int, column: int, plane: int) -> int:
        return (plane * self._stored_rows + row) * self._columns + column


def stored_layout(
    page: Any, file: SlideFile, where: str, strip_height: int | None = None
) -> StoredLayout:
    """The layout of a tifffile page; strip_height: rows of the strips where it is not the tag's.

    Raises UnsupportedError where the segments mean nothing outside this file, SlideError where
    they cannot be read.
    """
    compression = int(page.compression)
    if compression in _BOUND_TO_FILE or page.jpegheader or int(page.fillorder) != 1:
        raise UnsupportedError(
            f"{where}: {compression_name(page)} segments of this kind cannot be copied into "
            "another file as they are"
        )
    return StoredLayout(
        height=int(page.imagelength),
        width=int(page.imagewidth),
        compression=compression,
        photometric=int(page.photometric),
        tile=(int(page.tilelength), int(page.tilewidth)) if page.is_tiled else None,
        rows_per_strip=None if page.is_tiled else strip_height or int(page.rowsperstrip),
        subsampling=_subsampling(page, file, where),
        jpegtables=bytes(page.jpegtables) if page.jpegtables else None,
        predictor=int(page.predictor),
        planarconfig=int(page.planarconfig),
    )


def _subsampling(page: Any, file: SlideFile, where: str) -> tuple[int, int] | None:
    """Of YCbCr pixels; where the directory does not say, as the first JPEG stream has it."""
    if int(page.photometric) != _YCBCR:
        return None
    told = page.tags.valueof(_TAG_SUBSAMPLING)
    if isinstance(told, tuple) and len(told) == 2:
        return int(told[0]), int(told[1])
    if int(page.compression) != _JPEG:
        return None
    for offset, count in zip(page.dataoffsets, page.databytecounts, strict=False):
        if count:
            stream = file.read(int(offset), min(int(count), MAX_SEGMENT_BYTES), where)
            with named(f"{where}: its first JPEG stream is damaged"):
                return jpegstream.jpeg_colours(stream)[1]
    return None


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


@contextlib.contextmanager
def usable(path: Path) -> Iterator[None]:
    """What the system says against a path becomes a SlideError that names it."""
    try:
        yield
    except WsicodecError:
        raise
    except OSError as error:
        raise SlideError(f"{path}: {error.strerror or error}") from None
    except ValueError as error:  # a name with a zero byte
        raise SlideError(f"{path}: is no name of a file: {error}") from None


def file_start(path: Path, count: int) -> bytes:
    """First bytes of a file, at least one.

    Raises SlideError for what is no file (a folder, a pipe, a device), and for a file without any.
    """
    with usable(path):
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise SlideError(f"{path}: is a folder, not a slide file")
        if not stat.S_ISREG(mode):
            # to open a pipe would wait for its writer, and a device has no end
            raise SlideError(f"{path}: is a pipe, a device or such, not a file")
        with path.open("rb") as file:
            start = file.read(count)
    if not start:
        raise SlideError(f"{path}: file is empty")
    return start


def is_tiff(start: bytes) -> bool:
    """True for the first bytes of a TIFF or BigTIFF file."""
    return start[:2] in (b"II", b"MM")


def check_compression(page: Any, where: str) -> None:
    """Raises UnsupportedError for a compression that is not read, before any tile is."""
    from wsicodec.plugins.tifffile import TIFF_COMPRESSION_TAG

    code = int(page.compression)
    if code not in _READ and code != TIFF_COMPRESSION_TAG:
        raise UnsupportedError(
            f"{where}: compression {compression_name(page)} (TIFF tag value {code}) is not read"
        )


def check_declared(data: bytes, compression: int, height: int, width: int, where: str) -> None:
    """Refuse a stream that says it is much more than its tile: it is decoded as it says.

    height, width: of the tile or strip. Raises LimitError. What does not say it passes here:
    ``check_stream`` refuses it before it is decoded to pixels.
    """
    declared = declared_size(data, compression)
    if declared is None:
        return
    rows, columns, channels = declared
    if rows * columns > 4 * height * width + 2**16 or channels > 4:
        raise LimitError(
            f"{where}: a stream of {rows} x {columns} pixels and {channels} channels lies in the "
            f"place of {height} x {width}"
        )


def check_stream(
    data: bytes, compression: int, tables: bytes | None, where: str, *, strict: bool
) -> None:
    """Refuse a stream that decoders would make pixels of although they are not all there.

    tables: of JPEG, tag 347. strict: find damage within a JPEG stream too, not only at its end.
    Raises SlideError.
    """
    check_whole(data, compression, where)
    if data and tells_size(compression) and declared_size(data, compression) is None:
        # what a library finds in it nonetheless may be of any size
        raise SlideError(f"{where}: its stream does not say how large its image is: it is damaged")
    if strict and compression == _JPEG and data:
        from wsicodec.slide.jpegscan import check_scans

        try:
            check_scans(data, tables)
        except FormatError as error:
            raise SlideError(f"{where}: {error}: the file is damaged") from None


def check_whole(data: bytes, compression: int, where: str) -> None:
    """Refuse a JPEG or JPEG-2000 stream that breaks off: decoders make up the rest in silence.

    Both kinds end with the same marker. Raises SlideError where it is missing; an empty segment is
    left out, not broken.
    """
    if compression == _JPEG:
        kind = "JPEG"
    elif compression in _JPEG2000 and data.startswith(_J2K_START):
        kind = "JPEG-2000"  # bare; of one in boxes, others may follow
    else:
        return
    if not data or data.endswith(jpegstream.END):
        return
    if jpegstream.END not in data.rstrip(b"\0")[-_PADDING:]:
        raise SlideError(f"{where}: its {kind} stream breaks off: the file is damaged")


def _numbers(values: Any, where: str) -> npt.NDArray[np.integer[Any]]:
    """Offsets or byte counts of a directory, which may be of any type of TIFF's."""
    numbers = np.asarray(values)
    if numbers.ndim != 1 or (numbers.size and numbers.dtype.kind not in "iu"):
        raise SlideError(f"{where}: the places of its tiles or strips are no numbers")
    return numbers


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


def rgb_of_ycbcr(image: Image) -> Image:
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
