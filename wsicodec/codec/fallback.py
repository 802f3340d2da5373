"""Mode decision: content that is not tissue goes to another mode where that takes fewer bytes.

A transform and tables fitted to tissue lose on drawings, text, test patterns and noise. A look at
the pixels, a fraction of a millisecond, tells which tiles may be such (``suspicions``); for
those the other modes of a tile are tried at the quality that the learned tile reached, by PSNR and
by SSIM, and the smallest is kept. A lossless tile that is smaller wins at any quality.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from wsicodec.bitstream import Mode, Tile
from wsicodec.codec.fidelity import ssim
from wsicodec.codec.protocol import Image
from wsicodec.codec.rate import ssim_decibels
from wsicodec.codec.reference import REFERENCE_CODECS
from wsicodec.errors import RuntimeMissingError
from wsicodec.metrics import psnr

EQUAL_NEIGHBOURS = 0.25
"""Share of pixels equal to their right neighbour from which a tile may be a drawing."""
RESTLESS = 0.7
"""Mean step between neighbours, in standard deviations, from which it may be noise or a pattern:
white noise has 1.13, tissue at 0.25 micrometres 0.1 ... 0.5."""
DARK = 48.0
"""Mean luma below which it may be fluorescence."""
COLOURFUL, INK = 150, 0.04
"""Range of a pixel's colours that stains hardly reach, and the share of such pixels from which a
tile may show ink: 0.9 % at most on the validation images."""
SPREAD = 4.0
"""Standard deviation of luma below which a tile is glass, and cheap in any mode."""

QUICK = 3.0
"""Bytes of a quick lossless stream against the learned tile's above which it is no drawing."""

_SOMETHING = 1e-9
FIRST_QUALITY, USUAL_SLOPE, LINES = 60, 0.15, 4
"""Where the search for another mode's quality begins, decibels that a step is usually worth, and
trials after which it only halves what is left."""

# the quick ones first: what they reach cuts the search of the last one short
LOSSY = {Mode.JPEG: "jpeg", Mode.JPEG2000: "jpeg2000", Mode.JPEGXL: "jpegxl"}
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)


@dataclass(frozen=True)
class Candidate:
    """A tile and the quality that its pixels have."""

    tile: Tile
    psnr: float
    ssim: float

    @property
    def size(self) -> int:
        return len(self.tile.pack())


def suspicions(image: Image) -> list[str]:
    """Why a tile may not be tissue; none for tissue and glass."""
    rows, columns = image.shape[:2]
    if rows < 2 or columns < 2:
        return []
    # every sixteenth row is enough to tell
    lines = image[:: max(1, min(16, rows // 16))]
    found = []
    equal = (lines[:, 1:] == lines[:, :-1]).all(2).mean()
    luma = lines.astype(np.float32) @ _LUMA
    spread = float(luma.std())
    if equal > EQUAL_NEIGHBOURS and spread > SPREAD:
        found.append("drawing")
    if spread > SPREAD and float(np.abs(np.diff(luma, axis=1)).mean()) > RESTLESS * spread:
        found.append("restless")
    if float(luma.mean()) < DARK:
        found.append("dark")
    if ((lines.max(2) - lines.min(2)) > COLOURFUL).mean() > INK:
        found.append("colourful")
    return found


def measured(tile: Tile, pixels: Image, image: Image) -> Candidate:
    """A candidate from a tile, what it decodes to, and the original."""
    return Candidate(tile, psnr(image, pixels), ssim(image, pixels))


def better_mode(image: Image, learned: Candidate, reasons: Sequence[str] = ()) -> Candidate:
    """The smallest tile of any mode whose PSNR and SSIM are at least the learned tile's.

    reasons: the tile's ``suspicions``. Tissue that was JPEG with flat parts passes for a drawing;
    a quick lossless stream, three times as large as the learned one at least, tells it from those.
    Where imagecodecs is missing, that is the learned tile.
    """
    best = learned
    lossless = REFERENCE_CODECS["lossless"]
    height, width = image.shape[:2]
    try:
        quick = lossless.encode(image, quality=100, lossless=True, effort=1)
        # a slow one finds patterns that repeat
        if len(quick) <= QUICK * learned.size or "restless" in reasons:
            data = lossless.encode(image, quality=100, lossless=True)
            exact = Candidate(Tile(Mode.LOSSLESS, height, width, data), float("inf"), 1.0)
            if exact.size <= best.size:
                best = exact
        elif list(reasons) == ["drawing"]:
            return best
    except RuntimeMissingError:
        return best
    for mode, name in LOSSY.items():
        try:
            found = _coarsest(image, mode, name, learned, best.size)
        except RuntimeMissingError:
            continue
        if found is not None and found.size < best.size:
            best = found
    return best


def _coarsest(
    image: Image, mode: Mode, name: str, wanted: Candidate, limit: int
) -> Candidate | None:
    """The coarsest quality of a mode that reaches ``wanted`` in fewer than ``limit`` bytes."""
    codec = REFERENCE_CODECS[name]
    options = {"subsampling": "444"} if mode is Mode.JPEG else {}
    height, width = image.shape[:2]

    def at(quality: int) -> Candidate:
        data = codec.encode(image, quality=quality, lossless=False, **options)
        tile = Tile(mode, height, width, data)
        return measured(tile, codec.decode(data), image)

    def short(candidate: Candidate) -> float:
        missing = wanted.psnr - candidate.psnr
        if candidate.ssim < wanted.ssim:
            more = ssim_decibels(wanted.ssim) - ssim_decibels(candidate.ssim)
            missing = max(missing, more, _SOMETHING)
        return missing

    return coarsest(at, short, limit)


def coarsest(
    at: Callable[[int], Candidate], short: Callable[[Candidate], float], limit: int
) -> Candidate | None:
    """The candidate of the lowest quality 1 ... 100 that is not short of anything; None where it
    takes ``limit`` bytes or more.

    short: decibels that a candidate lacks, 0 or less where it is good. Quality, decibels and size
    rise together. Each step goes where the line through two trials says that nothing is missing,
    just below rather than above: a trial there that takes too many bytes ends the search.
    """
    low, high, quality, found = 0, 101, FIRST_QUALITY, None
    trials: list[tuple[int, float]] = []
    while True:
        candidate = at(quality)
        missing = short(candidate)
        if missing <= 0:
            found, high = candidate, quality
        elif candidate.size >= limit:
            return None  # those that are good are larger still
        else:
            low = quality
        if high - low == 1:
            return found if found is not None and found.size < limit else None
        trials.append((quality, missing))
        quality = min(max(_crossing(trials, (low + high) // 2), low + 1), high - 1)


def _crossing(trials: Sequence[tuple[int, float]], middle: int) -> int:
    """Quality to try next; middle: of those left, where the trials say nothing."""
    (quality, missing), slope = trials[-1], USUAL_SLOPE
    if len(trials) > LINES:
        return middle
    if len(trials) > 1:
        before, missing_before = trials[-2]
        slope = (missing_before - missing) / (quality - before)
    if not math.isfinite(missing) or not math.isfinite(slope) or slope <= 0:
        return middle
    return quality + math.floor(max(-100.0, min(missing / slope, 100.0)))
