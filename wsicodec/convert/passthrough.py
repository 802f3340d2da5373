"""A slide's own compressed tiles in a new file: copied bit by bit, or JPEG packed as JPEG-XL.

Nothing is decoded to be coded again. ``copy_slide`` takes the segments of any TIFF over into an
OME-TIFF pyramid. ``transcode_slide`` re-packs JPEG tiles as JPEG-XL, which takes a quarter off
their bytes and is undone by ``wsicodec.convert.restore`` to the last bit. What decoders make of
the two differs: JPEG-XL has its own way from the same coefficients to pixels.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

from wsicodec.codec.transcoded import jpeg_of_container
from wsicodec.convert.deidentify.cleaning import cleaned
from wsicodec.convert.ordered import in_order
from wsicodec.convert.results import ConvertReport, Progress
from wsicodec.convert.rewrap import (
    COPY,
    TRANSCODE,
    Job,
    PassingLevel,
    PassOptions,
    as_stream_says,
    segment_shape,
    write_passing,
)
from wsicodec.errors import (
    FormatError,
    LimitError,
    SettingsError,
    UnsupportedError,
    WsicodecError,
)
from wsicodec.settings import thread_budget
from wsicodec.slide.jpegstream import ADOBE_RGB, app0_names, jpeg_colours, with_tables
from wsicodec.slide.pages import check_declared, named
from wsicodec.slide.protocol import Level, SlideReader, StoredLayout
from wsicodec.slide.tiff import TiffReader
from wsicodec.slide.transcoding import (
    MAX_BYTES,
    MAX_KEPT_BYTES,
    MAX_TABLES_BYTES,
    TAG_TRANSCODE,
    Way,
)
from wsicodec.slide.white import white_segment

_JPEG, _JPEGXL = 7, 50002
_RGB, _YCBCR = 2, 6  # values of tag 262
IN_FLIGHT = 4
"""Tiles under way per thread."""


def copyable(reader: SlideReader) -> str | None:
    """Why the slide's compressed tiles cannot be put into another TIFF as they are, or None."""
    if not isinstance(reader, TiffReader):
        return (
            f"{reader.info.path}: tiles of {reader.info.format} slides cannot be copied as they "
            "are; choose a codec that codes pixels, such as jpegxl or lossless"
        )
    for level in reader.levels:
        try:
            layout = reader.stored_layout(level.index)
        except UnsupportedError as error:
            return str(error)
        if layout.planarconfig != 1:
            return (
                f"{reader.info.path}: level {level.index}: red, green and blue are stored apart, "
                "which OME-TIFF readers of slides do not expect; choose a codec that codes pixels"
            )
        factors = layout.subsampling or (1, 1)
        if not all(1 <= factor <= 16 for factor in (*factors, layout.predictor)):
            return (
                f"{reader.info.path}: level {level.index}: YCbCrSubSampling {factors} or Predictor "
                f"{layout.predictor} means nothing"
            )
        if layout.jpegtables is not None and len(layout.jpegtables) > MAX_TABLES_BYTES:
            return (
                f"{reader.info.path}: level {level.index}: {len(layout.jpegtables)} bytes of JPEG "
                "tables cannot be true"
            )
    return None


def transcodable(reader: SlideReader, *, strip_metadata: bool = False) -> str | None:
    """Why the slide's tiles cannot be re-packed as JPEG-XL and back, or None.

    strip_metadata: as in ``PassOptions``.
    """
    reason = copyable(reader)
    if reason is not None or not isinstance(reader, TiffReader):
        return reason
    if any(_packs(reader, level, strip_metadata) for level in reader.levels):
        return None
    return (
        f"{reader.info.path}: no level has JPEG tiles that JPEG-XL can take and give back "
        f"({reader.info.compression}); use the codec copy or lossless"
    )


def copy_slide(
    reader: SlideReader,
    target: str | Path,
    options: PassOptions | None = None,
    progress: Progress | None = None,
) -> ConvertReport:
    """Put the tiles of every level into a BigTIFF as they are.

    No tile is decoded: a broken one is copied with its faults. Tiles that the source leaves out
    become white ones. Raises UnsupportedError for what cannot be taken over (see ``copyable``),
    SlideError naming a tile beyond the end of the file, VerifyError where the written file does not
    read back as the source; nothing is left then.
    """
    tiff = _checked(reader, copyable(reader))
    chosen = options or PassOptions()
    # what lets a transcoded file be restored goes along with its tiles
    carried = None if chosen.strip_metadata else transcode_tag(tiff)
    work = [_Copying(tiff, level.index, chosen.strip_metadata) for level in tiff.levels]
    return write_passing(Job.of(tiff, target, COPY, chosen, carried), work, progress)


def transcode_slide(
    reader: SlideReader,
    target: str | Path,
    options: PassOptions | None = None,
    progress: Progress | None = None,
    *,
    jobs: int | None = None,
) -> ConvertReport:
    """Re-pack the JPEG tiles as JPEG-XL, such that ``restore`` gives back every bit of them.

    jobs: threads; None takes the thread budget.

    Each tile is turned back and compared before it is written. Levels that are not JPEG, or of a
    kind that JPEG-XL does not know, are copied, and so are the images beside the slide. A single
    tile that JPEG-XL has no way for is stored as lossless JPEG-XL of its pixels, its JPEG bytes in
    the file's private tag; one that is so broken that it has no pixels ends the work.

    Raises as ``copy_slide``, UnsupportedError without JPEG levels or with too many such tiles.
    """
    chosen = options or PassOptions()
    tiff = _checked(reader, transcodable(reader, strip_metadata=chosen.strip_metadata))
    threads = thread_budget() if jobs is None else jobs
    if threads < 1:
        raise SettingsError(f"jobs {threads} is not 1 or more")
    job = Job.of(tiff, target, TRANSCODE, chosen)
    limit = _KeptLimit(f"{tiff.info.path}")
    with ThreadPoolExecutor(threads, thread_name_prefix="wsicodec") as pool:
        work = [
            _Transcoding(tiff, level.index, chosen.strip_metadata, pool, threads * IN_FLIGHT, limit)
            if _packs(tiff, level, chosen.strip_metadata)
            else _Copying(tiff, level.index, chosen.strip_metadata)
            for level in tiff.levels
        ]
        return write_passing(job, work, progress)


def _checked(reader: SlideReader, reason: str | None) -> TiffReader:
    if reason is not None:
        raise UnsupportedError(reason)
    assert isinstance(reader, TiffReader)
    return reader


def _packs(reader: TiffReader, level: Level, strip: bool) -> bool:
    """True for a level of JPEG tiles if its first, its middle or its last one can be packed."""
    if not _is_jpeg(reader.stored_layout(level.index)):
        return False
    work = _FromReader(reader, level.index, strip, None)
    count = level.rows * level.columns
    for start in (0, count // 2, count - 1):
        for number in (*range(start, count), *range(start)):
            data = work.read(*divmod(number, level.columns))
            if data and pack_jpeg(data, work.before) is not None:
                return True
            if data:
                break
    return False


def transcode_tag(reader: TiffReader) -> bytes | None:
    """Value of the tag that says how tiles were transcoded, None without one.

    Nobody has checked it. Raises LimitError for one that is too large, SlideError where it cannot
    be read.
    """
    import tifffile

    path = reader.info.path
    if reader.info.record is None:
        return None
    with named(f"{path}: transcode tag cannot be read"), tifffile.TiffFile(path) as tiff:
        tag = tiff.pages.first.tags.get(TAG_TRANSCODE)
        if tag is None:
            return None
        if tag.count > MAX_BYTES:
            raise LimitError(f"{path}: transcode tag of {tag.count} bytes exceeds {MAX_BYTES}")
        return bytes(tag.value)


def _is_jpeg(layout: StoredLayout) -> bool:
    return layout.compression == _JPEG


class _FromReader(PassingLevel):
    """Segments of an open slide, cleaned of metadata where that is asked for."""

    def __init__(
        self, reader: TiffReader, index: int, strip: bool, compression: int | None
    ) -> None:
        self._reader = reader
        self._level = reader.levels[index]
        self._strip = strip
        before = reader.stored_layout(index)
        self._where = f"{reader.info.path}: level {index}"
        if strip and before.jpegtables is not None:
            with _naming(f"{self._where}: JPEG tables"):
                before = replace(before, jpegtables=cleaned(_JPEG, before.jpegtables))
        after = before
        if compression is not None:
            after = StoredLayout(
                height=before.height,
                width=before.width,
                compression=compression,
                photometric=_RGB,
                tile=before.tile,
                rows_per_strip=before.rows_per_strip,
            )
        super().__init__(before, after, self._level.rows * self._level.columns)
        self._white: dict[int, bytes] = {}

    def _places(self) -> Iterator[tuple[int, int]]:
        for row in range(self._level.rows):
            for column in range(self._level.columns):
                yield row, column

    def _name(self, row: int, column: int) -> str:
        return f"{self._where}: tile at row {row}, column {column}"

    def read(self, row: int, column: int) -> bytes:
        """A segment of the source; empty where it has none."""
        data = self._reader.tile_bytes(self._level.index, row, column)
        if self._strip:
            with _naming(self._name(row, column)):
                data = cleaned(self.before.compression, data, self.before.jpegtables)
        return data

    def _first(self) -> bytes | None:
        """The first segment that there is."""
        return next(filter(None, (self.read(*place) for place in self._places())), None)

    def _left_out(self, row: int) -> bytes:
        """The segment that stands for one that the source leaves out."""
        height, width = segment_shape(self.after, row)
        if height not in self._white:
            like = None
            if _is_jpeg(self.after):
                like = self._first()
            with _naming(self._where):
                self._white[height] = white_segment(self.after, height, width, like)
        return self._white[height]


class _Copying(_FromReader):
    """Segments as they are."""

    def __init__(self, reader: TiffReader, index: int, strip: bool) -> None:
        super().__init__(reader, index, strip, None)
        self.after = as_stream_says(self.after, self._first())

    def segments(self) -> Iterator[bytes]:
        for row, column in self._places():
            data = self.read(row, column)
            if data:
                yield self.note(Way.COPIED, data, data)
            else:
                yield self.note(Way.LEFT_OUT, b"", self._left_out(row))


class _KeptLimit:
    """How much may be kept beside transcoded tiles, over all levels."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._bytes = 0

    def add(self, data: bytes) -> None:
        """Raises UnsupportedError when it becomes too much."""
        self._bytes += len(data)
        if self._bytes > MAX_KEPT_BYTES:
            raise UnsupportedError(
                f"{self._where}: more than {MAX_KEPT_BYTES} bytes of its JPEG tiles are of a kind "
                "that JPEG-XL cannot take back; use the codec copy"
            )


class _Transcoding(_FromReader):
    """JPEG segments as JPEG-XL, computed by many threads, in order."""

    def __init__(
        self,
        reader: TiffReader,
        index: int,
        strip: bool,
        pool: ThreadPoolExecutor,
        in_flight: int,
        limit: _KeptLimit,
    ) -> None:
        super().__init__(reader, index, strip, _JPEGXL)
        self._pool = pool
        self._in_flight = in_flight
        self._limit = limit

    def segments(self) -> Iterator[bytes]:
        tasks = (functools.partial(self._transcode, *place) for place in self._places())
        for way, original, stored in in_order(self._pool, tasks, self._in_flight):
            if way is Way.KEPT:
                self._limit.add(original)
            yield self.note(way, original, stored)

    def _transcode(self, row: int, column: int) -> tuple[Way, bytes, bytes]:
        data = self.read(row, column)
        if not data:
            return Way.LEFT_OUT, b"", self._left_out(row)
        packed = pack_jpeg(data, self.before)
        if packed is not None:
            return packed[0], data, packed[1]
        return Way.KEPT, data, self._pixels(row, column)

    def _pixels(self, row: int, column: int) -> bytes:
        """A tile's pixels without loss, at its full size."""
        import imagecodecs

        image = self._reader.decode_tile(self._level.index, row, column)
        height, width = segment_shape(self.after, row)
        padding = [(0, height - image.shape[0]), (0, width - image.shape[1]), (0, 0)]
        image = np.pad(image, padding, mode="edge")
        with named(f"{self._name(row, column)}: cannot be coded as JPEG-XL"):
            return bytes(imagecodecs.jpegxl_encode(image, lossless=True, numthreads=1))


def pack_jpeg(data: bytes, layout: StoredLayout) -> tuple[Way, bytes] | None:
    """A JPEG segment as JPEG-XL that turns back into it; None where there is none.

    layout: of its directory, which holds the tables and says whether it is RGB or YCbCr; JPEG-XL
    knows that from the stream alone, where Adobe's segment has to say what only TIFF's tags said.
    """
    import imagecodecs

    try:
        check_declared(data, _JPEG, *segment_shape(layout, 0), "tile")
        way, whole = _self_explaining(data, layout)
        packed = bytes(imagecodecs.jpegxl_encode_jpeg(whole, numthreads=1))
        more = len(layout.jpegtables or b"")
        back = jpeg_of_container(packed, metadata=True, more=more)  # as `restore` does
    except (FormatError, LimitError, IndexError, RuntimeError, ValueError):
        return None
    return (way, packed) if back == whole else None


def _self_explaining(data: bytes, layout: StoredLayout) -> tuple[Way, bytes]:
    """The stream with its tables, and with Adobe's segment where it needs one; else FormatError."""
    whole = with_tables(layout.jpegtables, data)
    ycbcr, _ = jpeg_colours(whole)
    headers = app0_names(whole)
    if layout.photometric == _YCBCR or b"JFIF\0" in headers:
        # markers tell, to readers of TIFF as to JPEG-XL
        if ycbcr or not headers:
            return Way.TRANSCODED, whole
    elif not headers:
        whole = with_tables(layout.jpegtables, data, ADOBE_RGB) if ycbcr else whole
        if not jpeg_colours(whole)[0]:
            return Way.AS_RGB if ycbcr else Way.TRANSCODED, whole
    raise FormatError("JPEG-XL would take the stream for YCbCr, which it is not")


@contextlib.contextmanager
def _naming(where: str) -> Iterator[None]:
    """Puts the place before the message of an error of ours."""
    try:
        yield
    except WsicodecError as error:
        raise type(error)(f"{where}: {error}") from error
