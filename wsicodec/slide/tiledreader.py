"""What readers share that find a file's own coded tiles: bounds, cache, and one hint."""

from __future__ import annotations

import abc
import contextlib
import hashlib
import os
from pathlib import Path

from wsicodec.errors import SettingsError, SlideError, UnknownModelError, WsicodecError
from wsicodec.slide.cache import SegmentCache
from wsicodec.slide.protocol import Image, SlideReader
from wsicodec.slide.region import region_of_tiles


class TiledReader(SlideReader, abc.ABC):
    """An open slide whose own coded tiles can be read one by one. Thread-safe.

    path: of the slide. cache_bytes: decoded tiles kept at most; with two rows of the file's tiles
    in it, reading in raster order decodes each of them once.
    """

    def __init__(self, path: str | os.PathLike[str], cache_bytes: int) -> None:
        self.path = Path(path)
        self._cache = SegmentCache(cache_bytes)
        self._closed = False

    def read_region(self, level: int, y: int, x: int, height: int, width: int) -> Image:
        """Pixels of a rectangle as a new uint8 (height, width, 3) RGB array.

        level: index; y, x: top left pixel in that level; the rectangle must lie inside the level.

        Raises SettingsError for a rectangle outside, SlideError naming a tile that is damaged.
        """
        self._check_level(level)
        return region_of_tiles(
            self.levels[level],
            f"{self.path}: level {level}",
            (y, x, height, width),
            lambda row, column: self._cache.get(
                (level, row, column), lambda: self._decoded(level, row, column)
            ),
        )

    def tile_bytes(self, level: int, row: int, column: int) -> bytes:
        """Coded bytes of one of the file's own tiles or strips; empty where the file has none.

        A JPEG tile may need the tables of its TIFF directory to decode. Chunks of single channels
        come one after the other.
        Raises SettingsError for a tile outside the level, SlideError where bytes are missing.
        """
        self._check_tile(level, row, column)
        return self._stored(level, row, column)

    def decode_tile(self, level: int, row: int, column: int) -> Image:
        """Pixels of one of the file's own tiles, uint8, cropped to the level; not cached.

        Raises SlideError or the error of our own codec, naming level, tile and reason.
        """
        self._check_tile(level, row, column)
        return self._decoded(level, row, column)

    @abc.abstractmethod
    def _stored(self, level: int, row: int, column: int) -> bytes: ...

    @abc.abstractmethod
    def _decode(self, level: int, row: int, column: int) -> Image: ...

    def _check_open(self) -> None:
        if self._closed:
            raise SlideError(f"{self.path}: the slide is closed")

    def _check_level(self, level: int) -> None:
        self._check_open()
        if not 0 <= level < len(self.levels):
            raise SettingsError(f"{self.path}: no level {level} among {len(self.levels)}")

    def _check_tile(self, level: int, row: int, column: int) -> None:
        self._check_level(level)
        grid = self.levels[level]
        if not (0 <= row < grid.rows and 0 <= column < grid.columns):
            raise SettingsError(
                f"{self.path}: level {level}: no tile ({row}, {column}) in {grid.rows} rows and "
                f"{grid.columns} columns"
            )

    def _decoded(self, level: int, row: int, column: int) -> Image:
        try:
            return self._decode(level, row, column)
        except UnknownModelError as error:
            if not self._carries_model_of(level, row, column):
                raise
            raise UnknownModelError(
                f"{error}, or trust the one that the slide carries: wsicodec models install "
                f"{self.path}"
            ) from None

    def _carries_model_of(self, level: int, row: int, column: int) -> bool:
        from wsicodec.codec import probe

        with contextlib.suppress(WsicodecError):  # the tile's own error says more
            model = self.embedded_model()
            named = probe(self._stored(level, row, column)).model
            if model is not None and named:
                return hashlib.sha256(model).hexdigest().startswith(named)
        return False
