"""Maps of a level's tiles as small pictures, and the outline of the tissue mask as a path."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from wsicodec.bitstream import Mode
from wsicodec.slide.passport import PLAIN_STREAM
from wsicodec.tissue.mask import TissueMask

Image = npt.NDArray[np.uint8]
Values = npt.NDArray[np.floating]
Grid = npt.NDArray[np.bool_]

MAX_SIDE = 400
"""Points of a map along a side; a slide of 100,000 pixels has 391 tiles of 256."""
MAX_RUNS = 6000
"""Straight pieces of the mask's outline; a finer one is drawn coarser."""

COLOURS = 64
# viridis: even steps of lightness, the same order for every kind of colour vision
_VIRIDIS = np.array(
    [
        (68, 1, 84),
        (71, 44, 122),
        (59, 81, 139),
        (44, 113, 142),
        (33, 144, 141),
        (39, 173, 129),
        (92, 200, 99),
        (170, 220, 50),
        (253, 231, 37),
    ],
    np.float64,
)
UNKNOWN = (200, 203, 209)
BELOW = (214, 0, 108)

# after Okabe and Ito, "Color Universal Design" (2008)
SHARED_GLASS = -1
MODE_COLOURS: dict[int, tuple[int, int, int]] = {
    SHARED_GLASS: (232, 234, 238),
    Mode.LEARNED: (0, 114, 178),
    Mode.CONSTANT: (176, 190, 205),
    Mode.JPEGXL: (230, 159, 0),
    Mode.JPEG: (240, 228, 66),
    Mode.JPEG2000: (204, 121, 167),
    Mode.LOSSLESS: (213, 94, 0),
    Mode.TRANSCODED: (0, 158, 115),
    PLAIN_STREAM: (86, 180, 233),
}


@dataclass(frozen=True)
class Scale:
    """Colours from low to high. bright_high: the high end is the bright one."""

    low: float
    high: float
    bright_high: bool

    def palette(self) -> Image:
        """uint8 (COLOURS, 3), from low to high."""
        at = np.linspace(0, len(_VIRIDIS) - 1, COLOURS)
        known = np.arange(len(_VIRIDIS))
        colours = np.stack([np.interp(at, known, _VIRIDIS[:, c]) for c in range(3)], axis=1)
        ordered = colours if self.bright_high else colours[::-1]
        return np.rint(ordered).astype(np.uint8)


def scale_of(values: Values, *, bright_high: bool, limit: float) -> Scale | None:
    """A scale from the 1st to the 99th percentile, round numbers; None where nothing is known.

    limit: what no value goes beyond.
    """
    known = values[np.isfinite(values)].astype(np.float64)
    if not known.size:
        return None
    low, high = (float(v) for v in np.percentile(known, (1, 99)))
    step = nice_step(max(high - low, 1e-3 * max(abs(high), 1e-6)) / 5)
    low, high = np.floor(low / step) * step, min(np.ceil(high / step) * step, limit)
    if high <= low:
        low = high - step
    return Scale(float(low), float(high), bright_high)


def nice_step(rough: float) -> float:
    """1, 2 or 5 times a power of ten, at least ``rough``."""
    power = 10.0 ** np.floor(np.log10(rough))
    return float(next(n * power for n in (1, 2, 5, 10) if n * power >= rough * (1 - 1e-9)))


def pooling(rows: int, columns: int) -> int:
    """Tiles along a side of one point of the map."""
    return -(-max(rows, columns) // MAX_SIDE)


def heat_map(values: Values, scale: Scale, below: Grid | None, factor: int) -> Image:
    """uint8 (rows, columns, 3): a colour for each point of ``factor`` x ``factor`` tiles.

    values: (rows, columns), NaN where not known, drawn in UNKNOWN. Of several tiles, the brightest
    colour is shown. below: tiles drawn in BELOW.
    """
    small = _pooled(values, factor, largest=scale.bright_high)
    share = (small.astype(np.float64) - scale.low) / (scale.high - scale.low)
    known = ~np.isnan(share)
    index = (np.clip(np.nan_to_num(share), 0, 1) * (COLOURS - 1)).astype(np.int64)
    picture: Image = scale.palette()[index]
    picture[~known] = UNKNOWN
    if below is not None:
        picture[_pooled(below.astype(np.float32), factor, largest=True) > 0] = BELOW
    return picture


def mode_map(mode: npt.NDArray[np.uint8], lengths: npt.NDArray[np.uint32], factor: int) -> Image:
    """uint8 (rows, columns, 3): the rarest mode of the tiles of each point, in its colour."""
    kinds = mode.astype(np.int16)
    kinds[lengths == 0] = SHARED_GLASS
    values, counts = np.unique(kinds, return_counts=True)
    order = values[np.argsort(-counts, kind="stable")]
    rank = np.zeros(kinds.shape, np.float32)
    for place, value in enumerate(order):
        rank[kinds == value] = place
    colours = np.array([MODE_COLOURS[int(value)] for value in order], np.uint8)
    return np.asarray(colours[_pooled(rank, factor, largest=True).astype(np.int64)])


def _pooled(values: Values, factor: int, *, largest: bool) -> Values:
    """The largest or smallest known value of each block of tiles; NaN where none is known."""
    if factor == 1:
        return values
    rows, columns = (-(-side // factor) for side in values.shape)
    padded = np.full((rows * factor, columns * factor), np.nan, np.float64)
    padded[: values.shape[0], : values.shape[1]] = values
    blocks = padded.reshape(rows, factor, columns, factor)
    # fmax and fmin pass over NaN; infinity, the PSNR of equal tiles, is a value
    pool = np.fmax if largest else np.fmin
    return np.asarray(pool.reduce(pool.reduce(blocks, axis=3), axis=1))


@dataclass(frozen=True)
class Outline:
    """Borders between tissue and glass. path: SVG path data in cells; cell: pixels of level 0."""

    path: str
    cell: int


def outline(mask: TissueMask) -> Outline:
    """The outline of a mask, coarser for masks beyond MAX_SIDE or with more than MAX_RUNS edges."""
    factor = -(-max(mask.tissue.shape) // MAX_SIDE)
    while True:
        small = _any_of(mask.tissue, factor)
        lines = _runs(small[1:] != small[:-1])
        stems = _runs((small[:, 1:] != small[:, :-1]).T)
        if len(lines) + len(stems) <= MAX_RUNS or max(small.shape) == 1:
            break
        factor *= 2
    parts = [f"M{start} {row + 1}h{length}" for row, start, length in lines]
    parts += [f"M{column + 1} {start}v{length}" for column, start, length in stems]
    return Outline("".join(parts), mask.cell * factor)


def _any_of(cells: Grid, factor: int) -> Grid:
    """Whether any cell of each block of ``factor`` x ``factor`` is set."""
    rows, columns = (np.arange(0, side, factor) for side in cells.shape)
    return np.logical_or.reduceat(np.logical_or.reduceat(cells, rows, axis=0), columns, axis=1)


def _runs(edges: Grid) -> list[tuple[int, int, int]]:
    """(row, start, length) of each unbroken run of True in the rows."""
    padded = np.pad(edges, ((0, 0), (1, 1))).astype(np.int8)
    change = np.diff(padded, axis=1)
    starts, ends = np.argwhere(change == 1), np.argwhere(change == -1)
    return [
        (int(row), int(start), int(end - start))
        for (row, start), end in zip(starts, ends[:, 1], strict=True)
    ]
