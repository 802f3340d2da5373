"""What turns symbols of a channel into latents and contexts, for every tilt of a model.

docs/format.md, "Gain", "Stages" and "Tilt".
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

TILT_PEAK = 32
MAX_FACTOR = 2**21
LEADING = 64
"""Channels whose mean step is what a gain index is felt as."""

# docs/format.md, "Gain": round(2**15 * 2**(i / 32)), literals of the format
OCTAVE_TABLE = np.array(
    [
        32768, 33486, 34219, 34968, 35734, 36516, 37316, 38133, 38968, 39821, 40693, 41584, 42495,
        43425, 44376, 45348, 46341, 47356, 48393, 49452, 50535, 51642, 52773, 53928, 55109, 56316,
        57549, 58809, 60097, 61413, 62757, 64132,
    ],
    np.int64,
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Factors:
    """Of channels, at one tilt.

    mean, context: int64, for channels with means and for those that are context. inverse_gain:
    float32. shift: int64, by how many classes symbols spread wider.
    """

    mean: Array
    context: Array
    inverse_gain: Array
    shift: Array

    @functools.cached_property
    def plain(self) -> bool:
        """Whether classes are what the networks say."""
        return not self.shift.any()


def tilted(factors: Factors, tilt: Array, share: int) -> Factors:
    """The factors at a tile's tilt, 0 ... 16. tilt: (channels,) eighths of an octave by which steps
    are finer at 16."""
    shift = (share * tilt.astype(np.int64) + 8) >> 4
    return Factors(
        _scaled(factors.mean, 4 * shift[: len(factors.mean)]),
        _scaled(factors.context, -4 * shift[: len(factors.context)]),
        (factors.inverse_gain * np.exp2(-shift / 8)).astype(np.float32),
        shift,
    )


def gain_of_level(factors: Factors) -> int:
    """Gain indices by which the steps of the leading channels are coarser than without a tilt."""
    return round(-4 * float(factors.shift[:LEADING].mean()))


def _scaled(factor: Array, exponent: Array) -> Array:
    """Integers times ``2**(exponent / 32)``, in integer arithmetic."""
    down = 15 - (exponent >> 5)
    product = factor * OCTAVE_TABLE[exponent & 31]
    found: Array = np.clip((product + (np.int64(1) << (down - 1))) >> down, 1, MAX_FACTOR - 1)
    return found
