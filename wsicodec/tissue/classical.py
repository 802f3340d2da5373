"""Tissue by thresholds: how far a cell's colour is from the slide's glass, after Otsu.

Glass is bright, smooth and of one hue; what absorbs light or colours it is not. The distance of a
cell is the larger of its loss of light and its colour cast against the glass, in grey levels.
Otsu's threshold splits the distances, and is then lowered: half tissue in a cell is tissue, and
pale tissue beside dark must stay. It never sinks into the noise of the glass.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from wsicodec.slide.protocol import Image
from wsicodec.tissue.morphology import bands, box_sum, without_specks

Bools = npt.NDArray[np.bool_]
Levels = npt.NDArray[np.uint8]

BLACK = 4  # not scanned where a whole square is as black as that: no tissue is
BLACK_REACH = 4
BRIGHT = 150  # glass is at least as bright, or the slide is no bright-field one
SHARE_OF_OTSU = 0.45
LOWEST, HIGHEST = 7, 28  # grey levels between which the threshold stays
CAST = 9  # grey levels
SPECK_CELLS = 4
SAMPLE_CELLS = 2**20  # looked at for the colour of the glass


def tissue_by_otsu(overview: Image) -> Bools:
    """bool (rows, columns): True where a cell holds tissue or anything else that is not glass."""
    scanned = ~unscanned(overview)
    glass = glass_colour(overview, scanned)
    if glass is None:
        return scanned
    return without_specks(unlike_glass(overview, glass, scanned), SPECK_CELLS)


def unlike_glass(overview: Image, glass: tuple[int, int, int], scanned: Bools) -> Bools:
    """Scanned cells whose distance from the glass is beyond the slide's own threshold."""
    distance = distance_from(overview, glass)
    return (distance >= threshold_of(distance, scanned)) & scanned


def unscanned(overview: Image) -> Bools:
    """Areas that the scanner left black, on a slide that has bright cells.

    A slide without bright cells is a fluorescent one: its black is picture.
    """
    black = np.empty(overview.shape[:2], np.bool_)
    bright = 0
    for rows in bands(len(overview)):
        black[rows] = (overview[rows] <= BLACK).all(axis=2)
        bright += int(np.count_nonzero((overview[rows] >= BRIGHT).all(axis=2)))
    if not black.any() or bright < 0.01 * black.size:
        return np.zeros_like(black)
    side = 2 * BLACK_REACH + 1
    whole = box_sum(black, BLACK_REACH) == side * side
    near = box_sum(whole, BLACK_REACH) > 0
    return np.asarray(black & near, np.bool_)


def glass_colour(overview: Image, where: Bools) -> tuple[int, int, int] | None:
    """RGB of the glass: the middle of the brightest smooth cells; None where none looks like it."""
    overview, where = _sample(overview, where)
    green = overview[..., 1].astype(np.int16)
    low, high = green.copy(), green.copy()
    for axis in (0, 1):
        for step in (1, -1):
            rolled = np.roll(green, step, axis)
            np.minimum(low, rolled, out=low)
            np.maximum(high, rolled, out=high)
    smooth = (high - low <= 12) & where
    cast = overview.max(axis=2) - overview.min(axis=2)
    candidates = smooth & (overview.min(axis=2) >= BRIGHT) & (cast <= 48)
    count = int(np.count_nonzero(candidates))
    if count < max(4, 1e-4 * where.size):
        return None
    # the most frequent brightness of the upper half: glass is one peak, pale tissue lies below it
    sums = overview[candidates].astype(np.int32).sum(axis=1)
    histogram = np.bincount(sums, minlength=766).astype(np.float64)
    histogram = np.convolve(histogram, np.hanning(15), mode="same")
    strong = np.flatnonzero(histogram >= 0.3 * histogram.max())
    peak = int(strong[-1])
    while peak > 0 and histogram[peak - 1] > histogram[peak]:
        peak -= 1
    near = np.abs(sums - peak) <= 9
    r, g, b = np.median(overview[candidates][near], axis=0)
    return round(r), round(g), round(b)


def coloured(overview: Image, glass: tuple[int, int, int]) -> Bools:
    """Cells with a cast of colour against the glass: stain or ink, neither dust nor shadow."""
    found = np.empty(overview.shape[:2], np.bool_)
    for rows in bands(len(overview)):
        lost = np.array(glass, np.int16) - overview[rows]
        darkest = np.maximum(np.maximum(lost[..., 0], lost[..., 1]), lost[..., 2])
        cast = darkest - np.minimum(np.minimum(lost[..., 0], lost[..., 1]), lost[..., 2])
        found[rows] = (cast >= CAST) & (5 * cast >= darkest)
    return found


def _sample(overview: Image, where: Bools) -> tuple[Image, Bools]:
    """Some bands of rows from all over, SAMPLE_CELLS in all at most, or everything of few cells."""
    rows, columns = where.shape
    height = max(1, min(rows, 64, SAMPLE_CELLS // columns))
    count = max(1, SAMPLE_CELLS // (height * columns))
    if count * height >= rows:
        return overview, where
    starts = np.linspace(0, rows - height, count).astype(np.int64)
    chosen = (starts[:, None] + np.arange(height)).ravel()
    return overview[chosen], where[chosen]


def distance_from(overview: Image, glass: tuple[int, int, int]) -> Levels:
    """How unlike glass a cell is, uint8 (rows, columns): loss of light or cast of colour."""
    distance = np.empty(overview.shape[:2], np.uint8)
    for rows in bands(len(overview)):
        lost = np.array(glass, np.int16) - overview[rows]
        darkest = np.maximum(np.maximum(lost[..., 0], lost[..., 1]), lost[..., 2])
        brightest = np.minimum(np.minimum(lost[..., 0], lost[..., 1]), lost[..., 2])
        # uneven light moves all channels alike: colour counts double
        distance[rows] = np.clip(np.maximum(darkest, 2 * (darkest - brightest)), 0, 255)
    sums = box_sum(distance, 1)
    for rows in bands(len(overview)):
        distance[rows] = (sums[rows] + 4) // 9
    return distance


def threshold_of(distance: Levels, scanned: Bools) -> int:
    """The distance from which on a cell is tissue."""
    histogram = np.zeros(256)
    for rows in bands(len(distance)):
        histogram += np.bincount(distance[rows][scanned[rows]], minlength=256)
    otsu = otsu_threshold(histogram)
    noise = 3 * _spread_of_glass(histogram)
    return int(np.clip(max(SHARE_OF_OTSU * otsu, noise), LOWEST, HIGHEST))


def otsu_threshold(histogram: npt.NDArray[np.float64]) -> int:
    """The level that parts a histogram best, after Otsu (1979); 0 for a single level."""
    total = histogram.sum()
    levels = np.arange(histogram.size)
    below = np.cumsum(histogram)
    moment = np.cumsum(histogram * levels)
    with np.errstate(divide="ignore", invalid="ignore"):
        between = (moment[-1] * below / total - moment) ** 2 / (below * (total - below))
    if not np.isfinite(between).any():
        return 0
    return int(np.nanargmax(between)) + 1


def _spread_of_glass(histogram: npt.NDArray[np.float64]) -> float:
    """Half width of the lowest peak: where half of the cells nearer than 16 levels lie within."""
    near = np.cumsum(histogram[:16])
    return float(np.searchsorted(near, near[-1] / 2)) if near[-1] else 0.0
