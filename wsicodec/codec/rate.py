"""Rate control: the coarsest tile that reaches a PSNR or an SSIM, in at most three encodes.

Quality is followed in decibels, ``-10 log10(1 - SSIM)`` for SSIM: over the gain index it is close
to a straight line, whose shape is common to most tissue (``typical``) and whose height is not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from wsicodec.codec.protocol import Image

T = TypeVar("T")

MOST_ENCODES = 3
ENOUGH = 0.25
"""Decibels above the target at which no further encode is made."""
MARGIN = 0.06
"""Decibels that the second encode aims above the target."""
SAFETY = 3
"""Gain indices added to the last encode when none before it reached the target."""
CAUTION = 0.15
"""Share of the way to go, or of what is too much, that is added to the aim."""
BUSY, USUAL_STEP = 3.0, 6.5
"""Decibels of PSNR that are lost with every doubling of the mean step between neighbouring samples,
and the step of the usual content."""
MOST_SHIFT = 9.0
SSIM_CEILING = 60.0
"""Decibels of an SSIM of 0.999999, and of all above."""


def ssim_decibels(ssim: float) -> float:
    """SSIM on a logarithmic scale, at most ``SSIM_CEILING``."""
    return min(-10 * math.log10(max(1 - ssim, 1e-6)), SSIM_CEILING)


@dataclass(frozen=True)
class Trial(Generic[T]):
    """An encode at a gain index, and the decibels that it reached."""

    gain: int
    reached: float
    coded: T


def typical_shift(image: Image) -> float:
    """Decibels by which the PSNR of an image is likely to differ from that of usual content at the
    same gain index: busy images have less. Found on training images."""
    step = (
        float(np.abs(np.diff(image[:, ::2].astype(np.int16), axis=0)).mean())
        if len(image) > 1
        else 0.0
    )
    return float(np.clip(-BUSY * math.log2((step + 0.1) / USUAL_STEP), -MOST_SHIFT, MOST_SHIFT))


def reach(
    target: float,
    encode: Callable[[int], tuple[float, T]],
    typical: npt.NDArray[np.float64],
    highest: int,
) -> Trial[T]:
    """The smallest of at most three encodes that reaches ``target`` decibels; where none does, the
    best of them.

    encode: gain index to (decibels, what was coded). typical: (256,) decibels of gain indices for
    the usual content, never decreasing. highest: the largest gain index to use.
    """
    curve = np.asarray(typical, float) + np.arange(len(typical)) * 1e-6
    tried: list[Trial[T]] = []
    gain = _first(curve[: highest + 1] >= target, highest)
    while True:
        reached, coded = encode(gain)
        tried.append(Trial(gain, reached, coded))
        tried.sort(key=lambda t: t.gain)
        best = min((t for t in tried if t.reached >= target), key=lambda t: t.gain, default=None)
        if len(tried) == MOST_ENCODES or (best is not None and best.reached < target + ENOUGH):
            break
        below = max((t.gain for t in tried if t.reached < target), default=-1)
        if best is None:
            gain = _first(_expected(curve, tried)[: highest + 1] >= target + MARGIN, highest)
            if len(tried) == MOST_ENCODES - 1:  # the last has to reach it
                gain += max(SAFETY, math.ceil(CAUTION * (gain - below)))
            gain = min(max(gain, below + 1), highest)
            if gain == below:
                break
        else:
            last = len(tried) == MOST_ENCODES - 1
            margin = CAUTION * (best.reached - target) if last else MARGIN / 2
            gain = _first(_expected(curve, tried)[: highest + 1] >= target + margin, highest)
            gain = min(max(gain, below + 1), best.gain - 1)
            if gain <= below:
                break
    return best if best is not None else max(tried, key=lambda t: t.reached)


def _first(reaches: npt.NDArray[np.bool_], otherwise: int) -> int:
    """Index of the first true value."""
    return int(np.argmax(reaches)) if reaches.any() else otherwise


def _expected(curve: npt.NDArray[np.float64], tried: Sequence[Trial[T]]) -> npt.NDArray[np.float64]:
    """Decibels by gain index, given the usual curve and what was tried, by rising gain.

    Between trials the curve is bent to pass through them. Above the last it rises as usual, or as
    it did between the last two where that is less.
    """
    gains = np.arange(len(curve))
    at = [t.gain for t in tried]
    expected = curve + np.interp(gains, at, [t.reached - float(curve[t.gain]) for t in tried])
    if len(tried) > 1:
        before, last = tried[-2:]
        slope = max(last.reached - before.reached, 0.0) / (last.gain - before.gain)
        beyond = gains > last.gain
        line = last.reached + slope * (gains - last.gain)
        expected[beyond] = np.minimum(expected, line)[beyond]
    return expected
