"""What is known of a file's levels and tiles, as rows of a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from wsicodec.metrics import PSNR_OF_EQUAL
from wsicodec.slide.passport import Passport, mode_name, summarise_level
from wsicodec.slide.protocol import Level, SlideInfo
from wsicodec.slide.record import LevelQuality
from wsicodec.tissue.mask import TissueMask

Grid = npt.NDArray[np.bool_]

WORST = 10


@dataclass(frozen=True)
class LevelFigures:
    """A row of the table of levels. stored: bytes of its tiles, bpp: bits per pixel of the level.

    origin: where its pixels came from. quality: of its measured tiles. None where not known.
    """

    level: Level
    stored: int | None
    origin: str | None
    quality: LevelQuality | None

    @property
    def bpp(self) -> float | None:
        """Bits per pixel."""
        if self.stored is None:
            return None
        return 8 * self.stored / (self.level.height * self.level.width)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        quality = self.quality
        return {
            "index": self.level.index,
            "height": self.level.height,
            "width": self.level.width,
            "rows": self.level.rows,
            "columns": self.level.columns,
            "stored_bytes": self.stored,
            "bits_per_pixel": self.bpp,
            "origin": self.origin,
            "quality": None
            if quality is None
            else {
                "measured": quality.measured,
                "below_floor": quality.below_floor,
                "psnr": [quality.psnr_mean, quality.psnr_p01, quality.psnr_worst],
                "ssim": [quality.ssim_mean, quality.ssim_p01, quality.ssim_worst],
            },
        }


@dataclass(frozen=True)
class TileFigures:
    """One tile. row, column: in the grid of tiles; y, x, height, width: pixels of its level.

    psnr: dB, inf for equal pixels, NaN where not known. quality: None where there is none.
    length: bytes of its stream. tissue: whether the mask has tissue in it, None without a mask.
    """

    level: int
    row: int
    column: int
    y: int
    x: int
    height: int
    width: int
    psnr: float
    ssim: float
    mode: str
    quality: int | None
    length: int
    tissue: bool | None
    below_floor: bool

    @property
    def bpp(self) -> float:
        """Bits per pixel of the level, padding not counted."""
        return 8 * self.length / (self.height * self.width)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready; PSNR of equal tiles as PSNR_OF_EQUAL."""
        return {
            "level": self.level,
            "row": self.row,
            "column": self.column,
            "y": self.y,
            "x": self.x,
            "height": self.height,
            "width": self.width,
            "psnr": None if math.isnan(self.psnr) else min(self.psnr, PSNR_OF_EQUAL),
            "ssim": self.ssim,
            "mode": self.mode,
            "quality": self.quality,
            "bytes": self.length,
            "tissue": self.tissue,
            "below_floor": self.below_floor,
        }


def level_figures(
    info: SlideInfo, stored: Sequence[int] | None, passport: Passport | None
) -> tuple[LevelFigures, ...]:
    """A row for every level, from the passport first, then the record."""
    record = info.record
    if stored is None and record is not None and len(record.level_bytes) == len(info.levels):
        stored = record.level_bytes
    floor = None if record is None else record.floor
    rows = []
    for index, level in enumerate(info.levels):
        quality = None
        if passport is not None:
            quality = summarise_level(passport.levels[index], floor)
        elif record is not None and index < len(record.level_quality):
            quality = record.level_quality[index]
        origins = () if record is None else record.levels
        rows.append(
            LevelFigures(
                level=level,
                stored=None if stored is None else stored[index],
                origin=origins[index] if index < len(origins) else None,
                quality=quality,
            )
        )
    return tuple(rows)


def tissue_grid(mask: TissueMask, level: Level) -> Grid:
    """(rows, columns) of the level's tiles, True where the mask has tissue in the tile.

    The same as ``not mask.all_glass(...)`` tile by tile, at once.
    """
    rows, columns = mask.tissue.shape
    down = _cells(mask, level.downsample, level.rows, level.tile_height, level.height, rows)
    across = _cells(mask, level.downsample, level.columns, level.tile_width, level.width, columns)
    bands = np.stack([mask.tissue[a:b].any(0) for a, b in zip(*down, strict=True)])
    return np.stack([bands[:, a:b].any(1) for a, b in zip(*across, strict=True)], axis=1)


def _cells(
    mask: TissueMask, downsample: float, tiles: int, side: int, length: int, cells: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """First cell, and the one after the last, under each tile along an axis."""
    starts = np.arange(tiles, dtype=np.float64) * side
    scale = downsample / mask.cell
    first = np.clip(np.floor(starts * scale).astype(np.int64), 0, cells - 1)
    end = np.ceil(np.minimum(starts + side, length) * scale).astype(np.int64)
    return first, np.clip(end, first + 1, cells)


@dataclass(frozen=True)
class Worst:
    """The tiles of lowest fidelity, worst first. by: ``SSIM`` or ``PSNR``.

    glass: the worst of the tiles without tissue, which the list leaves out unless they miss the
    floor; None where there is no mask or no such tile.
    """

    by: str
    tiles: tuple[TileFigures, ...]
    glass: TileFigures | None


def worst_tiles(info: SlideInfo, passport: Passport, count: int = WORST) -> Worst:
    """The ``count`` worst of the measured tiles of all levels.

    By SSIM, or by PSNR where a floor is set for that alone. Where the file has a tissue mask, tiles
    without tissue are counted among them only if they miss the floor: the noise of glass, of no use
    to anybody, has the lowest SSIM of all.
    """
    floor = None if info.record is None else info.record.floor
    by_psnr = floor is not None and floor.ssim is None and floor.psnr is not None
    found: list[tuple[float, int, int]] = []
    glass: list[tuple[float, int, int]] = []
    for index, (level, maps) in enumerate(zip(info.levels, passport.levels, strict=True)):
        values = maps.psnr if by_psnr else maps.ssim
        eligible = ~np.isnan(values)
        if passport.mask is not None:
            plain = ~tissue_grid(passport.mask, level) & ~maps.below(floor)
            glass += _lowest(values, eligible & plain, index, 1)
            eligible &= ~plain
        found += _lowest(values, eligible, index, count)
    found.sort()
    pick = [tile_figures(info, passport, index, at) for _, index, at in found[:count]]
    other = min(glass, default=None)
    return Worst(
        by="PSNR" if by_psnr else "SSIM",
        tiles=tuple(pick),
        glass=None if other is None else tile_figures(info, passport, *other[1:]),
    )


def _lowest(
    values: npt.NDArray[np.float32], eligible: Grid, level: int, count: int
) -> list[tuple[float, int, int]]:
    """(value, level, flat index) of the lowest eligible values."""
    places = np.flatnonzero(eligible)
    flat = values.reshape(-1)[places]
    order = np.argsort(flat, kind="stable")[:count]
    return [(float(flat[at]), level, int(places[at])) for at in order]


def tile_figures(info: SlideInfo, passport: Passport, index: int, flat: int) -> TileFigures:
    """All that is known of the ``flat``-th tile of a level, in raster order."""
    level, maps = info.levels[index], passport.levels[index]
    row, column = divmod(flat, maps.columns)
    y, x = row * level.tile_height, column * level.tile_width
    height = min(level.tile_height, level.height - y)
    width = min(level.tile_width, level.width - x)
    floor = None if info.record is None else info.record.floor
    tissue = None
    if passport.mask is not None:
        tissue = not passport.mask.all_glass(level.downsample, y, x, height, width)
    return TileFigures(
        level=index,
        row=row,
        column=column,
        y=y,
        x=x,
        height=height,
        width=width,
        psnr=float(maps.psnr[row, column]),
        ssim=float(maps.ssim[row, column]),
        mode=mode_name(int(maps.mode[row, column])),
        quality=int(maps.quality[row, column]) or None,
        length=int(maps.bytes[row, column]),
        tissue=tissue,
        below_floor=bool(maps.below(floor)[row, column]),
    )
