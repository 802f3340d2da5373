"""Gives back the JPEG tiles of a file that ``transcode_slide`` made, to the last bit."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from wsicodec.codec.transcoded import jpeg_of_container
from wsicodec.convert.ordered import in_order
from wsicodec.convert.passthrough import IN_FLIGHT, transcode_tag
from wsicodec.convert.results import ConvertReport, Progress
from wsicodec.convert.rewrap import (
    COPY,
    Job,
    PassingLevel,
    PassOptions,
    as_stream_says,
    segment_shape,
    write_passing,
)
from wsicodec.errors import ChecksumError, FormatError, LimitError, SettingsError, UnsupportedError
from wsicodec.settings import thread_budget
from wsicodec.slide.jpegstream import ADOBE_RGB, without_tables
from wsicodec.slide.opening import open_slide
from wsicodec.slide.pages import check_declared
from wsicodec.slide.tiff import TiffReader
from wsicodec.slide.transcoding import LevelOrigin, Way, parse_origins
from wsicodec.slide.white import white_segment

_JPEGXL = 50002
_HEADS = {Way.TRANSCODED: b"", Way.AS_RGB: ADOBE_RGB}


def restore(
    source: str | Path,
    target: str | Path,
    *,
    layout: str = "subifd",
    overwrite: bool = False,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> ConvertReport:
    """Write the file that ``copy_slide`` would have made of the slide before it was transcoded.

    Every tile and table is compared with the checksums that were taken of the original, and the
    written file is read back. The target appears only when all of them match.
    jobs: threads; None takes the thread budget.

    Raises UnsupportedError for a file that was not transcoded, FormatError and ChecksumError naming
    the tile where the file was changed since, SlideError for what cannot be read or written.
    """
    threads = thread_budget() if jobs is None else jobs
    if threads < 1:
        raise SettingsError(f"jobs {threads} is not 1 or more")
    with open_slide(source) as reader:
        levels = levels_before(reader)
        assert isinstance(reader, TiffReader)
        record = reader.info.record
        options = PassOptions(layout, overwrite)
        if record is not None:
            options = replace(
                options,
                strip_metadata=record.settings.get("strip_metadata") is True,
                source=lambda: record.source,
                deidentified=record.deidentified,
            )
        job = Job.of(reader, target, COPY, options)
        with ThreadPoolExecutor(threads, thread_name_prefix="wsicodec") as pool:
            work = [_Restoring(level, pool, threads * IN_FLIGHT) for level in levels]
            return write_passing(job, work, progress)


def levels_before(reader: object) -> tuple[LevelBefore, ...]:
    """The levels of a transcoded file as they were, checked against the file's own directories.

    Raises UnsupportedError for a file that was not transcoded, FormatError and LimitError for a tag
    that is broken or of another file.
    """
    if not isinstance(reader, TiffReader):
        raise UnsupportedError("only TIFF files can be restored")
    path = reader.info.path
    data = transcode_tag(reader)
    if data is None:
        raise UnsupportedError(
            f"{path}: was not made with --lossless-transcode, there is nothing to restore from it"
        )
    try:
        origins = parse_origins(data)
    except (FormatError, LimitError, UnsupportedError) as error:
        raise type(error)(f"{path}: {error}") from error
    if len(origins) != len(reader.levels):
        raise FormatError(
            f"{path}: transcode tag tells of {len(origins)} levels, the file has "
            f"{len(reader.levels)}"
        )
    for level, origin in zip(reader.levels, origins, strict=True):
        here, there = reader.stored_layout(level.index), origin.layout
        if (here.height, here.width, here.tile, here.rows_per_strip) != (
            there.height,
            there.width,
            there.tile,
            there.rows_per_strip,
        ):
            raise FormatError(
                f"{path}: level {level.index}: transcode tag tells of another size or other tiles"
            )
    return tuple(LevelBefore(reader, index, origin) for index, origin in enumerate(origins))


@dataclass(frozen=True)
class LevelBefore:
    """A level of a transcoded file as it was before. index: of the level; origin: of the tag."""

    reader: TiffReader
    index: int
    origin: LevelOrigin

    @functools.cached_property
    def _kept(self) -> dict[int, bytes]:
        numbers = (n for n, way in enumerate(self.origin.ways) if way == Way.KEPT)
        return dict(zip(numbers, self.origin.kept, strict=True))

    def segment(self, number: int) -> tuple[Way, bytes]:
        """Bytes of a segment of the original; none where that left it out.

        Raises ChecksumError and FormatError naming the tile where it is not what was transcoded.
        """
        level, way = self.reader.levels[self.index], Way(self.origin.ways[number])
        row, column = divmod(number, level.columns)
        where = f"{self.reader.info.path}: level {self.index}: tile at row {row}, column {column}"
        if way is Way.LEFT_OUT:
            return way, b""
        if way is Way.KEPT:
            data = self._kept[number]
        else:
            data = self.reader.tile_bytes(self.index, row, column)
            if way in _HEADS:
                check_declared(data, _JPEGXL, *segment_shape(self.origin.layout, row), where)
                data = self._unpacked(data, way, where)
        if zlib.crc32(data) != self.origin.checks[number]:
            raise ChecksumError(f"{where}: is not the tile that was transcoded")
        return way, data

    def first(self) -> bytes | None:
        """The first segment that there is."""
        for number, way in enumerate(self.origin.ways):
            if way != Way.LEFT_OUT:
                return self.segment(number)[1]
        return None

    def _unpacked(self, data: bytes, way: Way, where: str) -> bytes:
        """The JPEG segment in a JPEG-XL stream."""
        tables = self.origin.layout.jpegtables
        try:
            whole = jpeg_of_container(data, metadata=True, more=len(tables or b""))
            return without_tables(tables, whole, _HEADS[way])
        except (FormatError, LimitError) as error:
            raise FormatError(
                f"{where}: its JPEG-XL stream does not turn back into JPEG: {error}"
            ) from error


class _Restoring(PassingLevel):
    """Segments of a level as they were before it was transcoded."""

    def __init__(self, level: LevelBefore, pool: ThreadPoolExecutor, in_flight: int) -> None:
        origin = level.origin
        super().__init__(origin.layout, origin.layout, len(origin.ways))
        self._level = level
        self._pool = pool
        self._in_flight = in_flight
        self.after = as_stream_says(self.after, level.first())

    def segments(self) -> Iterator[bytes]:
        level = self._level
        columns = level.reader.levels[level.index].columns
        tasks = (functools.partial(level.segment, n) for n in range(len(level.origin.ways)))
        white: dict[int, bytes] = {}
        for number, (way, data) in enumerate(in_order(self._pool, tasks, self._in_flight)):
            if way is Way.LEFT_OUT:
                height, width = segment_shape(self.after, number // columns)
                if height not in white:
                    white[height] = white_segment(self.after, height, width, level.first())
                yield self.note(way, b"", white[height])
            else:
                yield self.note(way, data, data)
        if self.origin().sha256 != level.origin.sha256:
            raise ChecksumError(
                f"{level.reader.info.path}: level {level.index}: its tiles and tables are not "
                "those that were transcoded"
            )
