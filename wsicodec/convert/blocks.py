"""Blocks: the unit of work of a conversion.

A block is a square of tiles of one level together with all that averages make of it: a block of
8 x 8 tiles holds whole tiles of three coarser levels. Blocks need nothing of each other, so they
can be coded in any order, on any core, and again after a crash. What a block leaves over for the
levels beyond is its last average, a *piece*; blocks of a later pass read pieces in place of the
slide.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from wsicodec.convert.plan import LevelPlan, Pass
from wsicodec.convert.tiles import CodedTile, TileCoder
from wsicodec.errors import SlideError, WsicodecError

Image = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Block:
    """A block by its place. number: of its pass; row, column: in the pass's grid of blocks."""

    number: int
    row: int
    column: int


@dataclass(frozen=True)
class CodedBlock:
    """A block's coded tiles, and its piece of the level after the last of its pass.

    piece: uint8 (rows, columns, 3); None where no later pass needs it.
    """

    block: Block
    tiles: tuple[CodedTile, ...]
    piece: Image | None


@dataclass(frozen=True)
class Rectangle:
    """Rows y ... y + height and columns x ... x + width of a level, in pixels."""

    y: int
    x: int
    height: int
    width: int


def blocks_of(number: int, work: Pass) -> Iterator[Block]:
    """All blocks of a pass, rows from the top."""
    for row in range(work.rows):
        for column in range(work.columns):
            yield Block(number, row, column)


def area_of(block: Block, work: Pass) -> Rectangle:
    """The block's pixels in the first level of its pass."""
    return _area(block, work.levels[0], work.side)


def tiles_in(block: Block, work: Pass) -> int:
    """Number of tiles of a block, over all levels of its pass."""
    count = 0
    for depth, level in enumerate(work.levels):
        area = _area(block, level, work.side >> depth)
        count += -(-area.height // level.tile_size) * -(-area.width // level.tile_size)
    return count


def pixels_in(block: Block, work: Pass) -> int:
    """Number of pixels of a block, over all levels of its pass."""
    areas = [_area(block, level, work.side >> d) for d, level in enumerate(work.levels)]
    return sum(area.height * area.width for area in areas)


def code_block(
    block: Block, work: Pass, pixels: Image, coder: TileCoder, stopped: threading.Event
) -> CodedBlock:
    """Code a block. pixels: of ``area_of(block, work)``. stopped: looked at before each tile.

    Errors name the level and the tile. Raises SlideError when it was stopped.
    """
    tiles: list[CodedTile] = []
    for depth, level in enumerate(work.levels):
        area = _area(block, level, work.side >> depth)
        size = level.tile_size
        for y in range(0, area.height, size):
            for x in range(0, area.width, size):
                if stopped.is_set():
                    raise SlideError("the conversion was stopped")
                row, column = (area.y + y) // size, (area.x + x) // size
                try:
                    tile = coder.code(level, row, column, pixels[y : y + size, x : x + size])
                except WsicodecError as error:
                    raise type(error)(
                        f"level {level.index}, tile at row {row}, column {column}: {error}"
                    ) from error
                tiles.append(tile)
        if depth + 1 < len(work.levels) or work.leaves_pieces:
            pixels = area_average(pixels)
    return CodedBlock(block, tuple(tiles), pixels if work.leaves_pieces else None)


def _area(block: Block, level: LevelPlan, tiles: int) -> Rectangle:
    side = tiles * level.tile_size
    y, x = block.row * side, block.column * side
    return Rectangle(y, x, max(0, min(side, level.height - y)), max(0, min(side, level.width - x)))


def area_average(image: Image) -> Image:
    """Half the size of a uint8 (rows, columns, 3) image, each pixel the mean of up to four.

    Sides are rounded up; the last row or column of an odd side averages what is there. Halves round
    up.
    """
    height, width = image.shape[:2]
    if height % 2 or width % 2:
        image = np.pad(image, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    rows = image[0::2].astype(np.uint16) + image[1::2]
    total = rows[:, 0::2] + rows[:, 1::2]
    return ((total + 2) >> 2).astype(np.uint8)
