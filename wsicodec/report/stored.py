"""What a file tells without a tile being read: bytes of levels and tiles, and its passport."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from wsicodec.errors import FormatError, LimitError, UnsupportedError, WsicodecError
from wsicodec.slide.layout import find_layout
from wsicodec.slide.pages import named
from wsicodec.slide.passport import Passport, parse_passport
from wsicodec.slide.protocol import SlideInfo, SlideReader

TIFF_FORMATS = ("svs", "ome-tiff", "tiff")


def stored_bytes(info: SlideInfo) -> tuple[int, ...] | None:
    """Bytes of the tiles or strips of each level; a stream that tiles share counts once.

    None for a file that is no TIFF, or whose directories are not those of ``info``.
    """
    pages = _directories(info)
    if pages is None:
        return None
    totals = []
    for offsets, counts in pages:
        _, first = np.unique(offsets, return_index=True)
        totals.append(int(counts[first].sum()))
    return tuple(totals)


def stored_lengths(info: SlideInfo) -> tuple[npt.NDArray[np.uint32] | None, ...]:
    """Per level, the length of each tile's stream as uint32 (rows, columns).

    0 where a tile shares its stream with another; None where segments are no grid of tiles.
    """
    pages = _directories(info)
    if pages is None:
        return (None,) * len(info.levels)
    grids: list[npt.NDArray[np.uint32] | None] = []
    for level, (offsets, counts) in zip(info.levels, pages, strict=True):
        if len(counts) != level.rows * level.columns:
            grids.append(None)
            continue
        _, first, inverse = np.unique(offsets, return_index=True, return_inverse=True)
        again = first[inverse.reshape(-1)] != np.arange(len(offsets))
        shared = np.isin(inverse.reshape(-1), inverse.reshape(-1)[again])
        own = np.where(shared, 0, np.minimum(counts, 2**32 - 1)).astype(np.uint32)
        grids.append(own.reshape(level.rows, level.columns))
    return tuple(grids)


def find_passport(slide: SlideReader) -> tuple[Passport | None, str | None]:
    """The passport in a file, or None and why there is none that can be used."""
    info = slide.info
    try:
        data = slide.embedded_passport()
        if data is None:
            return None, "the file has no quality passport"
        passport = parse_passport(data)
        passport.check_grids([(level.rows, level.columns) for level in info.levels])
    except (FormatError, LimitError, UnsupportedError) as error:
        return None, f"the file's quality passport cannot be used: {error}"
    return passport, None


def _directories(
    info: SlideInfo,
) -> list[tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]] | None:
    """(offsets, byte counts) of every level's segments."""
    if info.format not in TIFF_FORMATS:
        return None
    import tifffile

    path = Path(info.path)
    try:
        with named(str(path)), tifffile.TiffFile(path) as file:
            pages = [
                (np.array(page.dataoffsets, np.uint64), np.array(page.databytecounts, np.uint64))
                for page in find_layout(file, path).pages
            ]
    except WsicodecError:
        return None
    fits = len(pages) == len(info.levels) and all(len(a) == len(b) for a, b in pages)
    return pages if fits else None
