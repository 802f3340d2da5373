"""Maps of a file made afterwards: from its own bytes, or by comparing it with its source."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

import wsicodec
from wsicodec.bitstream import Mode
from wsicodec.convert.against import check_source, source_region
from wsicodec.convert.ordered import in_order
from wsicodec.errors import FormatError
from wsicodec.metrics import psnr, ssim
from wsicodec.report.stored import stored_lengths
from wsicodec.settings import thread_budget
from wsicodec.slide.passport import MAX_TILES, PLAIN_STREAM, LevelMap, Passport
from wsicodec.slide.protocol import Image, Level, SlideReader
from wsicodec.tissue.mask import TissueMask

Progress = Callable[[int, int], None]


@runtime_checkable
class TileReader(SlideReader, Protocol):
    """A reader that hands out the file's own tiles, as those of TIFF and OME-Zarr do."""

    def tile_bytes(self, level: int, row: int, column: int) -> bytes:
        """Coded bytes of a tile; empty where the file has none."""
        ...

    def decode_tile(self, level: int, row: int, column: int) -> Image:
        """Pixels of a tile, cropped to the level."""
        ...


def measure(
    slide: TileReader,
    source: SlideReader | None,
    mask: TissueMask | None = None,
    *,
    jobs: int | None = None,
    progress: Progress | None = None,
) -> Passport | None:
    """The maps of a file that came without, or maps to check those of a file by.

    source: decode every tile and compare it with this slide; None reads lengths and modes alone.
    mask: that glass was filled by: as when the file was made, tiles are compared with filled
    pixels, and tiles of glass alone not at all.
    progress: called with (tiles done, tiles) in the calling thread.

    None for more tiles than a passport holds. Raises SlideError for what cannot be read,
    VerifyError where ``source`` has another size.
    """
    if source is not None:
        check_source(slide, source)
    total = sum(level.rows * level.columns for level in slide.levels)
    if total > MAX_TILES:
        return None
    looks = [
        _Look(slide, source, mask, level, _empty_map(level, grid), grid is None)
        for level, grid in zip(slide.levels, stored_lengths(slide.info), strict=True)
    ]
    workers = thread_budget() if jobs is None else jobs
    tasks = (
        functools.partial(look.at, row, column)
        for look in looks
        for row, column in _places(look.level)
    )
    with ThreadPoolExecutor(workers, thread_name_prefix="wsicodec") as pool:
        for done, _ in enumerate(in_order(pool, tasks, 4 * workers), 1):
            if progress is not None:
                progress(done, total)
    return Passport(tuple(look.maps for look in looks), mask)


def _places(level: Level) -> Iterator[tuple[int, int]]:
    return ((row, column) for row in range(level.rows) for column in range(level.columns))


def _empty_map(level: Level, lengths: npt.NDArray[np.uint32] | None) -> LevelMap:
    shape = (level.rows, level.columns)
    return LevelMap(
        *shape,
        np.zeros(shape, np.uint32) if lengths is None else lengths,
        psnr=np.full(shape, np.nan, np.float32),
        ssim=np.full(shape, np.nan, np.float32),
        quality=np.zeros(shape, np.uint8),
        mode=np.full(shape, PLAIN_STREAM, np.uint8),
    )


@dataclass(frozen=True)
class _Look:
    """Fills in the maps of a level, tile by tile; no two tiles write to the same place.

    unknown: lengths are not known from the file's directories.
    """

    slide: TileReader
    source: SlideReader | None
    mask: TissueMask | None
    level: Level
    maps: LevelMap
    unknown: bool

    def at(self, row: int, column: int) -> None:
        """Look at one tile."""
        maps, level = self.maps, self.level
        coded = self.slide.info.compression == "wsicodec"
        if coded or self.unknown:
            data = self.slide.tile_bytes(level.index, row, column)
            if self.unknown:
                maps.bytes[row, column] = len(data)
            if coded and data:
                mode, quality = self._mode_of(data, row, column)
                maps.mode[row, column], maps.quality[row, column] = mode, quality
        if self.source is not None:
            self._compare(self.source, row, column)

    def _compare(self, source: SlideReader, row: int, column: int) -> None:
        level = self.level
        y, x = row * level.tile_height, column * level.tile_width
        height = min(level.tile_height, level.height - y)
        width = min(level.tile_width, level.width - x)
        place = (y, x, height, width)
        mask = self.mask
        if mask is not None and mask.all_glass(level.downsample, *place):
            return
        original = source_region(self.slide, source, level.index, *place)
        if original is None:
            return
        if mask is not None:
            original[mask.glass(level.downsample, *place)] = mask.background
        pixels = self.slide.decode_tile(level.index, row, column)
        self.maps.psnr[row, column] = psnr(original, pixels)
        self.maps.ssim[row, column] = ssim(original, pixels)

    def _mode_of(self, data: bytes, row: int, column: int) -> tuple[int, int]:
        """(mode, quality) of a stream."""
        try:
            info = wsicodec.probe(data)
            return int(Mode[info.mode.upper()]), info.quality or 0
        except KeyError:
            return PLAIN_STREAM, 0
        except FormatError as error:
            place = f"level {self.level.index}: tile at row {row}, column {column}"
            raise FormatError(f"{self.slide.info.path}: {place}: {error}") from error
