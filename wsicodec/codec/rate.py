"""Rate control: the coarsest tile that reaches a PSNR or an SSIM, in at most three encodes.

Quality is followed in decibels, ``-10 log10(1 - SSIM)`` for SSIM: over the gain index it is close
to a straight line, whose shape is common to most tissue (``typical``) and whose height is not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

T = TypeVar("T")

MOST_ENCODES = 3
ENOUGH = 0.25
"""Decibels above the target at which no further encode is made."""
MARGIN = 0.06
"""Decibels that the second encode aims above the target."""
SAFETY = 3
"""Gain indices added to the last encode when none before it reached the target."""
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

    def gain_for(wanted: float, tried: list[Trial[T]], more: int = 0) -> int:
        """Where the curve, moved to pass through what was tried, reaches ``wanted``."""
        moved = curve.copy()
        if tried:
            known = sorted((t.gain, t.reached - float(curve[t.gain])) for t in tried)
            gains, apart = [k[0] for k in known], [k[1] for k in known]
            moved += np.interp(np.arange(len(curve)), gains, apart)
        reaching = np.nonzero(moved[: highest + 1] >= wanted)[0]
        first = int(reaching[0]) if len(reaching) else highest
        return min(first + more, highest)

    tried: list[Trial[T]] = []
    gain = gain_for(target, tried)
    while True:
        reached, coded = encode(gain)
        tried.append(Trial(gain, reached, coded))
        good = [t for t in tried if t.reached >= target]
        best = min(good, key=lambda t: t.gain, default=None)
        if len(tried) == MOST_ENCODES or (best is not None and best.reached < target + ENOUGH):
            break
        last = len(tried) == MOST_ENCODES - 1
        if best is None:
            gain = gain_for(target + MARGIN, tried, SAFETY if last else 0)
            below = max(t.gain for t in tried)
            gain = max(gain, min(below + 1, highest))
            if gain in (t.gain for t in tried):
                break
        else:
            below = max((t.gain for t in tried if t.reached < target), default=-1)
            gain = gain_for(target + MARGIN / 2, tried)
            gain = min(max(gain, below + 1), best.gain - 1)
            if gain <= below:
                break
    return best if best is not None else max(tried, key=lambda t: t.reached)
