"""The pixels of a source that a tile of a file made from it must look like."""

from __future__ import annotations

import numpy as np

from wsicodec.convert.blocks import area_average
from wsicodec.errors import VerifyError
from wsicodec.slide.protocol import Image, SlideReader
from wsicodec.slide.record import AREA_AVERAGE

MAX_SOURCE_PIXELS = 2**24
"""Pixels of the source that one averaged tile may be made from: four halvings of 256 x 256."""


def check_source(slide: SlideReader, source: SlideReader) -> None:
    """Raise VerifyError where level 0 of two slides differs in size."""
    first, other = slide.levels[0], source.levels[0]
    if (first.height, first.width) != (other.height, other.width):
        raise VerifyError(
            f"{slide.info.path}: level 0 has {first.width} x {first.height} pixels, "
            f"{source.info.path} has {other.width} x {other.height}: not its source"
        )


def source_region(
    slide: SlideReader, source: SlideReader, index: int, y: int, x: int, height: int, width: int
) -> Image | None:
    """The source's pixels of a rectangle of a level of a file made from it.

    A level that was averaged is averaged anew from the source's level 0. None where the source has
    no such level, or too many pixels would have to be read.
    """
    level = slide.levels[index]
    record = slide.info.record
    origin = "" if record is None or index >= len(record.levels) else record.levels[index]
    if origin != AREA_AVERAGE:
        for other in source.levels:
            if (other.height, other.width) == (level.height, level.width):
                return source.read_region(other.index, y, x, height, width)
    first = source.levels[0]
    halvings = round(np.log2(first.width / level.width))
    step = 2**halvings
    if (-(-first.height // step), -(-first.width // step)) != (level.height, level.width):
        return None
    bottom, right = min((y + height) * step, first.height), min((x + width) * step, first.width)
    if (bottom - y * step) * (right - x * step) > MAX_SOURCE_PIXELS:
        return None
    pixels = source.read_region(0, y * step, x * step, bottom - y * step, right - x * step)
    for _ in range(halvings):
        pixels = area_average(pixels)
    return pixels
