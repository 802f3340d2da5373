"""Images and slides as tiles: what a folder holds, and where tissue is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from wsicodec import metrics
from wsicodec.metrics import Image

Place = tuple[int, int, int, int]
"""(y, x, rows, columns) of a tile in its image."""

IMAGE_SUFFIXES = {
    ".jpg": "jpeg8_decode",
    ".jpeg": "jpeg8_decode",
    ".png": "png_decode",
    ".webp": "webp_decode",
    ".jxl": "jpegxl_decode",
}
SLIDE_SUFFIXES = {".tif", ".tiff", ".svs", ".ndpi", ".scn", ".bif", ".qptiff"}
OVERVIEW_SIDE = 4096
"""Tiles of a slide are chosen on its largest level of at most this side."""
GLASS_DEVIATION = 4.0
"""A place is glass where luma deviates by less than this many levels."""


def find_images(folder: Path) -> list[Path]:
    """Images and slides below a folder, sorted; or the file itself."""
    if folder.is_file():
        return [folder]
    known = {*IMAGE_SUFFIXES, *SLIDE_SUFFIXES}
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix.lower() in known)


def grid(height: int, width: int, tile: int) -> list[Place]:
    """Places of the whole tiles; a side shorter than the tile is one row of it."""
    rows, columns = min(height, tile), min(width, tile)
    return [
        (y, x, rows, columns)
        for y in range(0, height - rows + 1, rows)
        for x in range(0, width - columns + 1, columns)
    ]


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """``count`` of the items, evenly spaced."""
    if len(items) <= count:
        return list(items)
    return [items[i * len(items) // count] for i in range(count)]


def load_tiles(path: Path, tile: int, max_tiles: int) -> list[Image]:
    """Tiles of an image or a slide; ValueError, OSError or a codec's error when it has none."""
    if path.suffix.lower() in SLIDE_SUFFIXES:
        import tifffile

        with tifffile.TiffFile(path) as tif:
            page, places = _slide_places(tif, tile, max_tiles)
            return [_region(page, *place) for place in spread(places, max_tiles)]
    image = _read(path)
    places = grid(image.shape[0], image.shape[1], tile)
    return [_cut(image, *place) for place in spread(places, max_tiles)]


@dataclass(frozen=True)
class Block:
    """Neighbouring whole tiles as one picture.

    pixels: uint8 RGB of ``down`` x ``across`` tiles of ``rows`` x ``columns`` pixels.
    y, x: its top left pixel in the image.
    """

    pixels: Image
    y: int
    x: int
    rows: int
    columns: int

    @property
    def down(self) -> int:
        return int(self.pixels.shape[0]) // self.rows

    @property
    def across(self) -> int:
        return int(self.pixels.shape[1]) // self.columns

    def places(self) -> list[Place]:
        """The tiles, row by row, in the picture's own coordinates."""
        return [
            (row * self.rows, column * self.columns, self.rows, self.columns)
            for row in range(self.down)
            for column in range(self.across)
        ]


def load_block(path: Path, tile: int, max_tiles: int) -> Block:
    """The whole tiles of an image; at most ``max_tiles`` of them, from the middle of the tissue.

    Raises ValueError, OSError or a codec's error when there is none.
    """
    if path.suffix.lower() in SLIDE_SUFFIXES:
        import tifffile

        with tifffile.TiffFile(path) as tif:
            page, places = _slide_places(tif, tile, max_tiles)
            centre_y, centre_x = np.mean([place[:2] for place in places], 0)
            middle = min(places, key=lambda p: math.hypot(p[0] - centre_y, p[1] - centre_x))
            place = _around(middle, page.imagelength, page.imagewidth, max_tiles)
            return Block(_region(page, *place), *place[:2], *middle[2:])
    image = _read(path)
    height, width = image.shape[:2]
    places = grid(height, width, tile)
    rows, columns = places[0][2:]
    middle_y, middle_x = (height // rows - 1) // 2 * rows, (width // columns - 1) // 2 * columns
    place = _around((middle_y, middle_x, rows, columns), height, width, max_tiles)
    return Block(_cut(image, *place), *place[:2], rows, columns)


def _around(middle: Place, height: int, width: int, max_tiles: int) -> Place:
    """The place of a block of tiles about the middle one, as square as its image lets it be."""
    y, x, rows, columns = middle
    down, across = height // rows, width // columns
    wide = min(across, max(math.isqrt(max_tiles), max_tiles // down))
    high = min(down, max_tiles // wide)
    top = min(max(y // rows - (high - 1) // 2, 0), down - high)
    left = min(max(x // columns - (wide - 1) // 2, 0), across - wide)
    return top * rows, left * columns, high * rows, wide * columns


def _read(path: Path) -> Image:
    import imagecodecs

    return _rgb(getattr(imagecodecs, IMAGE_SUFFIXES[path.suffix.lower()])(path.read_bytes()))


def _rgb(image: npt.NDArray[Any]) -> Image:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (3, 4):
        raise ValueError(f"not 8-bit RGB: {image.dtype} {image.shape}")
    if image.shape[2] == 4 and (image[..., 3] != 255).any():
        raise ValueError("has transparency")
    return image[..., :3]


def _cut(image: Image, y: int, x: int, rows: int, columns: int) -> Image:
    return np.ascontiguousarray(image[y : y + rows, x : x + columns])


def _slide_places(tif: Any, tile: int, max_tiles: int) -> tuple[Any, list[Place]]:
    """The page of the largest level, and its tiles: all, or those with tissue if there are more
    than ``max_tiles``."""
    levels = [level.keyframe for level in tif.series[0].levels]
    page = levels[0]
    height, width = page.imagelength, page.imagewidth
    if page.samplesperpixel not in (3, 4) or page.dtype != np.uint8 or page.planarconfig != 1:
        raise ValueError(f"not 8-bit RGB: {page.dtype} {page.shape}")
    small = [p for p in levels[1:] if max(p.imagelength, p.imagewidth) <= OVERVIEW_SIDE]
    places = grid(height, width, tile)
    if len(places) > max_tiles:
        overview = small[0] if small else page if max(height, width) <= OVERVIEW_SIDE else None
        if overview is not None:
            places = _tissue(_rgb(overview.asarray()), places, height, width)
    return page, places


def _tissue(overview: Image, places: list[Place], height: int, width: int) -> list[Place]:
    """The places that are not plain glass; all of them when none is left."""
    luma = metrics.luma(overview)
    down, right = luma.shape[0] / height, luma.shape[1] / width
    kept = []
    for y, x, rows, columns in places:
        top, left = int(y * down), int(x * right)
        bottom, end = math.ceil((y + rows) * down), math.ceil((x + columns) * right)
        if luma[top:bottom, left:end].std() >= GLASS_DEVIATION:
            kept.append((y, x, rows, columns))
    return kept or places


def _region(page: Any, y: int, x: int, rows: int, columns: int) -> Image:
    """A part of a page, by decoding only the segments (tiles or strips) that it touches."""
    if page.is_tiled:
        step_y, step_x = page.tilelength, page.tilewidth
    else:
        step_y, step_x = page.rowsperstrip, page.imagewidth
    across = -(-page.imagewidth // step_x)
    out = np.empty((rows, columns, 3), np.uint8)
    for row in range(y // step_y, (y + rows - 1) // step_y + 1):
        for column in range(x // step_x, (x + columns - 1) // step_x + 1):
            index = row * across + column
            page.parent.filehandle.seek(page.dataoffsets[index])
            data = page.parent.filehandle.read(page.databytecounts[index])
            segment, _, shape = page.decode(
                data, index, jpegtables=page.jpegtables, jpegheader=page.jpegheader
            )
            if segment is None:
                raise ValueError(f"segment {index} is empty")
            pixels = _rgb(segment[0])
            top, left = row * step_y, column * step_x
            y0, x0 = max(y, top), max(x, left)
            y1, x1 = min(y + rows, top + shape[1]), min(x + columns, left + shape[2])
            out[y0 - y : y1 - y, x0 - x : x1 - x] = pixels[
                y0 - top : y1 - top, x0 - left : x1 - left
            ]
    return out
