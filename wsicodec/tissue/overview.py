"""A slide at about 8 µm per pixel, area-averaged from the cheapest level, in bounded memory."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from wsicodec.slide.protocol import Image, Level, SlideInfo, SlideReader
from wsicodec.tissue.mask import MAX_CELL, MAX_CELLS

MICROMETRES = 8.0
ASSUMED_MPP = 0.5
READ_PIXELS = 2**21  # of one call to the reader: 6 MiB


def micrometres_per_pixel(info: SlideInfo) -> float:
    """µm per pixel of level 0: as told, else guessed from the magnification, else 0.5."""
    for told in (info.mpp_x, info.mpp_y):
        if told is not None and 0.01 <= told <= 100:
            return float(told)
    if info.magnification is not None and 0.5 <= info.magnification <= 250:
        return 10 / info.magnification
    return ASSUMED_MPP


def cell_of(info: SlideInfo) -> int:
    """Pixels of level 0 per cell: the power of two nearest 8 µm, larger for huge slides."""
    cell: int = 1 << max(0, round(math.log2(MICROMETRES / micrometres_per_pixel(info))))
    top = info.levels[0]
    while -(-top.height // cell) * -(-top.width // cell) > MAX_CELLS and cell < MAX_CELL:
        cell *= 2
    return cell


def read_overview(slide: SlideReader, cell: int) -> Image:
    """RGB uint8 (rows, columns, 3): the mean of every cell of ``cell`` x ``cell`` level 0 pixels.

    Reads the smallest level that is fine enough, at most READ_PIXELS pixels at a time where the
    slide's own tiles allow.
    """
    top = slide.levels[0]
    rows, columns = -(-top.height // cell), -(-top.width // cell)
    level = _cheapest(slide.levels, cell)
    overview = np.empty((rows, columns, 3), np.uint8)
    # level pixels per cell; by axis, as levels round their sides
    tall = cell * level.height / top.height
    wide = cell * level.width / top.width
    down, across = _block(level, tall, wide)
    for row in range(0, rows, down):
        for column in range(0, columns, across):
            part = overview[row : row + down, column : column + across]
            y = _edges(row, part.shape[0], tall, level.height)
            x = _edges(column, part.shape[1], wide, level.width)
            y0, y1 = math.floor(y[0]), math.ceil(y[-1])
            x0, x1 = math.floor(x[0]), math.ceil(x[-1])
            pixels = slide.read_region(level.index, y0, x0, y1 - y0, x1 - x0)
            means = _averaged(pixels, y - y0, axis=0)
            part[:] = np.rint(_averaged(means, x - x0, axis=1))
    return overview


def _cheapest(levels: tuple[Level, ...], cell: int) -> Level:
    """The smallest level with at least a pixel per cell, give or take the rounding of its size."""
    fine = [level for level in levels if level.downsample <= cell * 1.02]
    return max(fine, key=lambda level: level.downsample, default=levels[0])


def _block(level: Level, tall: float, wide: float) -> tuple[int, int]:
    """Rows and columns of cells to read at once: whole tiles of the file where they fit."""
    side = math.isqrt(READ_PIXELS)
    across = min(level.width, max(level.tile_width, side // level.tile_width * level.tile_width))
    across = max(1, math.floor(min(across, READ_PIXELS // math.ceil(tall)) / wide))
    room = READ_PIXELS / max(1.0, across * wide)
    tiles = max(1, math.floor(room) // level.tile_height)
    down = max(1, math.floor(min(room, tiles * level.tile_height) / tall))
    return down, across


def _edges(start: int, count: int, scale: float, limit: int) -> npt.NDArray[np.float64]:
    """The count + 1 borders of cells along an axis, in pixels of the level, within it."""
    edges = np.arange(start, start + count + 1) * scale
    near = np.rint(edges)
    # borders a rounding error away from a pixel's are meant to be there
    edges = np.where(np.abs(edges - near) < 1e-6 * np.maximum(1, near), near, edges)
    edges = np.minimum(edges, limit)
    # a last cell thinner than a pixel still needs some of it
    return np.maximum.accumulate(np.minimum(edges, limit - 1e-3 * (count - np.arange(count + 1))))


def _averaged(
    values: npt.NDArray[np.generic], edges: npt.NDArray[np.float64], axis: int
) -> npt.NDArray[np.float64]:
    """Means between consecutive edges along an axis, parts of pixels counted as parts."""
    moved = np.moveaxis(values, axis, 0)
    if (edges == np.rint(edges)).all():
        borders = edges.astype(np.int64)
        exact = np.uint32 if values.dtype == np.uint8 else np.float64
        sums = np.add.reduceat(moved, borders[:-1], axis=0, dtype=exact)
        return np.moveaxis(sums / _column(np.diff(borders), moved.ndim), 0, axis)
    total = np.zeros((moved.shape[0] + 1, *moved.shape[1:]), np.float64)
    np.cumsum(moved, axis=0, dtype=np.float64, out=total[1:])
    whole = np.minimum(np.floor(edges).astype(np.int64), moved.shape[0] - 1)
    at = total[whole] + _column(edges - whole, moved.ndim) * moved[whole]
    return np.moveaxis(np.diff(at, axis=0) / _column(np.diff(edges), moved.ndim), 0, axis)


def _column(values: npt.NDArray[np.generic], dimensions: int) -> npt.NDArray[np.generic]:
    """Values along the first of so many dimensions."""
    return values.reshape(-1, *[1] * (dimensions - 1))
