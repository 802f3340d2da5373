"""Rectangles of pixels out of the tiles that hold them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from wsicodec.errors import SettingsError
from wsicodec.slide.protocol import Image, Level


def empty_region(size: tuple[int, int], where: str, place: tuple[int, int, int, int]) -> Image:
    """A uint8 (height, width, 3) array for the pixels of a rectangle, not set yet.

    size: height and width of the level; the others as in ``region_of_tiles``.
    Raises SettingsError for a rectangle that is not inside the level.
    """
    y, x, height, width = place
    if not (0 <= y <= y + height <= size[0] and 0 <= x <= x + width <= size[1]):
        raise SettingsError(
            f"{where}: region of {height} x {width} at ({y}, {x}) is not inside "
            f"{size[0]} x {size[1]} (rows x columns)"
        )
    return np.empty((height, width, 3), np.uint8)


def region_of_tiles(
    level: Level,
    where: str,
    place: tuple[int, int, int, int],
    tile: Callable[[int, int], Image],
) -> Image:
    """Pixels of a rectangle of a level as a new uint8 (height, width, 3) array.

    place: y, x, height, width. tile: the pixels of the level's tile at (row, column), cropped to
    the level. where: the file and level, for the message.
    Raises SettingsError for a rectangle that is not inside the level.
    """
    region = empty_region((level.height, level.width), where, place)
    if not region.size:
        return region
    y, x, height, width = place
    tall, wide = level.tile_height, level.tile_width
    for row in range(y // tall, (y + height - 1) // tall + 1):
        for column in range(x // wide, (x + width - 1) // wide + 1):
            pixels = tile(row, column)
            top, left = row * tall, column * wide
            y0, y1 = max(y, top), min(y + height, top + pixels.shape[0])
            x0, x1 = max(x, left), min(x + width, left + pixels.shape[1])
            region[y0 - y : y1 - y, x0 - x : x1 - x] = pixels[
                y0 - top : y1 - top, x0 - left : x1 - left
            ]
    return region
