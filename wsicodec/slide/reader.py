"""Slides as pyramids of RGB pixels: Aperio SVS, OME-TIFF, and tiled or stripped TIFF.

``SlideReader`` decodes only the tiles that a region touches, keeps the latest ones in a bounded
cache, and may be used from many threads at once. tifffile parses the files and decodes the tiles.
"""

from __future__ import annotations

import collections
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from wsicodec.errors import SettingsError, SlideError, WsicodecError
from wsicodec.slide.layout import find_layout, lossy_history, resolution_mpp
from wsicodec.slide.pages import Page, SlideFile, named
from wsicodec.slide.record import TAG_MODEL, TAG_RECORD, FileRecord, parse_record

Image = npt.NDArray[np.uint8]

DEFAULT_CACHE_BYTES = 256 * 2**20
_ICC_PROFILE = 34675


@dataclass(frozen=True)
class Level:
    """One resolution of a pyramid.

    height, width: pixels. downsample: width of level 0 over width of this level.
    tile_height, tile_width: of the file's own tiles, or of its strips; pixels.
    """

    index: int
    height: int
    width: int
    downsample: float
    tile_height: int
    tile_width: int

    @property
    def rows(self) -> int:
        """Rows of the file's own tiles."""
        return -(-self.height // self.tile_height)

    @property
    def columns(self) -> int:
        """Columns of the file's own tiles."""
        return -(-self.width // self.tile_width)


@dataclass(frozen=True)
class SlideInfo:
    """What a slide file says of itself.

    format: ``svs``, ``ome-tiff`` or ``tiff``. file_bytes: size of the file.
    mpp_x, mpp_y: µm per pixel of level 0; magnification: of the objective; None where not told.
    photometric: as stored, ``rgb`` or ``ycbcr``; pixels are always handed out as RGB.
    compression: of level 0's tiles.
    description: ImageDescription of the scanner's file, also where a converted file keeps it.
    history: lossy codings the pixels went through as far as the file tells, oldest first.
    associated: names of images beside the pyramid (thumbnail, label, macro ...).
    record: how wsicodec coded the file, None for all others.
    """

    path: Path
    format: str
    file_bytes: int
    levels: tuple[Level, ...]
    mpp_x: float | None
    mpp_y: float | None
    magnification: float | None
    photometric: str
    compression: str
    icc_profile: bytes | None
    description: str | None
    history: tuple[str, ...]
    associated: tuple[str, ...]
    record: FileRecord | None

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready; the ICC profile as its length."""
        return {
            "path": str(self.path),
            "format": self.format,
            "file_bytes": self.file_bytes,
            "levels": [
                {
                    "index": level.index,
                    "height": level.height,
                    "width": level.width,
                    "downsample": level.downsample,
                    "tile_height": level.tile_height,
                    "tile_width": level.tile_width,
                }
                for level in self.levels
            ],
            "mpp_x": self.mpp_x,
            "mpp_y": self.mpp_y,
            "magnification": self.magnification,
            "photometric": self.photometric,
            "compression": self.compression,
            "icc_profile_bytes": None if self.icc_profile is None else len(self.icc_profile),
            "description": self.description,
            "history": list(self.history),
            "associated": list(self.associated),
            "record": None if self.record is None else self.record.as_dict(),
        }


class SlideReader:
    """An open slide.

    path: the file. cache_bytes: decoded tiles kept at most; with two rows of the file's tiles in
    it, reading in raster order decodes each of them once.

    Raises SlideError where the file is missing, empty, damaged or no TIFF, and UnsupportedError
    where its pixels are not 8-bit RGB or its format is one that this version does not read.

    >>> with SlideReader("slide.svs") as slide:
    ...     tile = slide.read_region(0, 1024, 2048, 256, 256)
    """

    def __init__(
        self, path: str | os.PathLike[str], cache_bytes: int = DEFAULT_CACHE_BYTES
    ) -> None:
        self.path = Path(path)
        self._check_file()
        import tifffile

        from wsicodec.plugins import tifffile as plugin

        plugin.install()
        self._cache = _SegmentCache(cache_bytes)
        self._closed = False
        with named(f"{self.path}: cannot be opened"):
            self._file = SlideFile(self.path)
        try:
            with named(f"{self.path}: cannot be read as TIFF"):
                self._tiff = tifffile.TiffFile(self.path)
            try:
                with named(f"{self.path}: TIFF structure is damaged"):
                    self._open()
            except BaseException:
                self._tiff.close()
                raise
        except BaseException:
            self._file.close()
            raise

    def _check_file(self) -> None:
        if self.path.is_dir():
            raise SlideError(f"{self.path}: is a folder, not a slide file")
        try:
            with self.path.open("rb") as file:
                start = file.read(4)
        except OSError as error:
            raise SlideError(f"{self.path}: {error.strerror or error}") from None
        if not start:
            raise SlideError(f"{self.path}: file is empty")
        if start[:2] not in (b"II", b"MM"):
            raise SlideError(f"{self.path}: not a TIFF file (starts with {start.hex(' ')})")

    def _open(self) -> None:
        layout = find_layout(self._tiff, self.path)
        self._pages = [
            Page(page, self._file, f"{self.path}: level {index}")
            for index, page in enumerate(layout.pages)
        ]
        first = self._pages[0]
        record = self._read_record()
        tag_x, tag_y = resolution_mpp(first.tags)
        profile = first.tags.valueof(_ICC_PROFILE)
        self.info = SlideInfo(
            path=self.path,
            format=layout.format,
            file_bytes=self._file.size,
            levels=tuple(
                Level(
                    index,
                    page.height,
                    page.width,
                    first.width / page.width,
                    page.segment_height,
                    page.segment_width,
                )
                for index, page in enumerate(self._pages)
            ),
            mpp_x=layout.mpp_x or tag_x,
            mpp_y=layout.mpp_y or layout.mpp_x or tag_y,
            magnification=layout.magnification,
            photometric=first.photometric,
            compression=first.compression,
            icc_profile=bytes(profile) if profile else None,
            description=layout.description or None,
            history=record.history
            if record
            else lossy_history(layout.description, first.compression),
            associated=layout.associated,
            record=record,
        )

    def _read_record(self) -> FileRecord | None:
        value = self._pages[0].tags.valueof(TAG_RECORD)
        if value is None:
            return None
        try:
            return parse_record(value)
        except WsicodecError as error:
            raise type(error)(f"{self.path}: {error}") from None

    @property
    def levels(self) -> tuple[Level, ...]:
        """Resolutions, finest first."""
        return self.info.levels

    def read_region(self, level: int, y: int, x: int, height: int, width: int) -> Image:
        """Pixels of a rectangle as a new uint8 (height, width, 3) RGB array.

        level: index; y, x: top left pixel in that level; the rectangle must lie inside the level.
        Tiles that the file leaves out are white, as glass is.

        Raises SettingsError for a rectangle outside, SlideError naming a tile that is damaged.
        """
        page = self._page(level)
        if not (0 <= y <= y + height <= page.height and 0 <= x <= x + width <= page.width):
            raise SettingsError(
                f"{self.path}: level {level}: region of {height} x {width} at ({y}, {x}) is not "
                f"inside {page.height} x {page.width} (rows x columns)"
            )
        region = np.empty((height, width, 3), np.uint8)
        if not region.size:
            return region
        tall, wide = page.segment_height, page.segment_width
        for row in range(y // tall, (y + height - 1) // tall + 1):
            for column in range(x // wide, (x + width - 1) // wide + 1):
                tile = self._segment(level, row, column)
                top, left = row * tall, column * wide
                y0, y1 = max(y, top), min(y + height, top + tile.shape[0])
                x0, x1 = max(x, left), min(x + width, left + tile.shape[1])
                region[y0 - y : y1 - y, x0 - x : x1 - x] = tile[
                    y0 - top : y1 - top, x0 - left : x1 - left
                ]
        return region

    def tile_bytes(self, level: int, row: int, column: int) -> bytes:
        """Coded bytes of one of the file's own tiles or strips; empty where the file has none.

        A JPEG tile may need the tables of its TIFF directory to decode.
        Raises SettingsError for a tile outside the level, SlideError where bytes are missing.
        """
        self._check_tile(level, row, column)
        return self._page(level).read(row, column)

    def decode_tile(self, level: int, row: int, column: int) -> Image:
        """Pixels of one of the file's own tiles, uint8, cropped to the level; not cached.

        Raises SlideError or the error of our own codec, naming level, tile and reason.
        """
        self._check_tile(level, row, column)
        return self._page(level).decode(row, column)

    def embedded_model(self) -> bytes | None:
        """Bytes of the model carried in the file, None without one. Nobody has checked them."""
        self._page(0)
        value = self._pages[0].tags.valueof(TAG_MODEL)
        return bytes(value) if value else None

    def close(self) -> None:
        """Close the file. Reading afterwards raises SlideError."""
        if not self._closed:
            self._closed = True
            self._tiff.close()
            self._file.close()

    def __enter__(self) -> SlideReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _page(self, level: int) -> Page:
        if self._closed:
            raise SlideError(f"{self.path}: the slide is closed")
        if not 0 <= level < len(self._pages):
            raise SettingsError(f"{self.path}: no level {level} among {len(self._pages)}")
        return self._pages[level]

    def _check_tile(self, level: int, row: int, column: int) -> None:
        self._page(level)
        grid = self.levels[level]
        if not (0 <= row < grid.rows and 0 <= column < grid.columns):
            raise SettingsError(
                f"{self.path}: level {level}: no tile ({row}, {column}) in {grid.rows} rows and "
                f"{grid.columns} columns"
            )

    def _segment(self, level: int, row: int, column: int) -> Image:
        page = self._pages[level]
        return self._cache.get((level, row, column), lambda: page.decode(row, column))


class _SegmentCache:
    """Latest decoded tiles up to a number of bytes; one thread decodes what several ask for."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._ready: collections.OrderedDict[tuple[int, int, int], Image] = (
            collections.OrderedDict()
        )
        self._running: dict[tuple[int, int, int], Future[Image]] = {}
        self._bytes = 0

    def get(self, key: tuple[int, int, int], make: Callable[[], Image]) -> Image:
        with self._lock:
            image = self._ready.get(key)
            if image is not None:
                self._ready.move_to_end(key)
                return image
            running = self._running.get(key)
            mine = running is None
            if running is None:
                running = self._running[key] = Future()
        if not mine:
            return running.result()
        try:
            image = make()
        except BaseException as error:
            with self._lock:
                del self._running[key]
            running.set_exception(error)
            raise
        with self._lock:
            del self._running[key]
            self._ready[key] = image
            self._bytes += image.nbytes
            while self._bytes > self._limit:
                self._bytes -= self._ready.popitem(last=False)[1].nbytes
        running.set_result(image)
        return image
