"""Dilation and clearing of specks on a grid of cells, with NumPy alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Bools = npt.NDArray[np.bool_]


def dilated(cells: Bools, radius: float) -> Bools:
    """Cells whose centre is within ``radius`` cells of a True one's centre."""
    reach = math.floor(radius)
    if reach < 1 or not cells.any():
        return cells.copy()
    out = cells.copy()
    for offset in range(min(reach, cells.shape[0] - 1) + 1):
        wide = _widened(cells, math.isqrt(math.floor(radius * radius - offset * offset)))
        out[offset:] |= wide[: wide.shape[0] - offset]
        out[: out.shape[0] - offset] |= wide[offset:]
    return out


def _widened(cells: Bools, reach: int) -> Bools:
    """Every row's True cells with ``reach`` more on either side."""
    if not reach:
        return cells
    out = cells.copy()
    done = 0
    while done < reach:  # doubling: a run of n cells takes log n passes
        step = min(reach - done, done + 1)
        grown = out.copy()
        grown[:, step:] |= out[:, :-step]
        grown[:, :-step] |= out[:, step:]
        out, done = grown, done + step
    return out


def spread(cells: Bools, within: Bools, steps: int) -> Bools:
    """True cells and what hangs together with them among ``within``, so many cells far."""
    out = cells
    for _ in range(steps):
        further = cells | (dilated(out, 1.5) & within)
        if np.array_equal(further, out):
            break
        out = further
    return out


def bands(rows: int, height: int = 256) -> Iterator[slice]:
    """Rows in order, so many at a time: what is computed in between stays small."""
    for start in range(0, rows, height):
        yield slice(start, min(rows, start + height))


def box_sum(
    values: npt.NDArray[Any], radius: int, border: Literal["edge", "constant"] = "edge"
) -> npt.NDArray[np.int16]:
    """Sum over squares of (2 radius + 1)² cells; sums must fit into int16.

    border: beyond it the outermost cells repeat, or are 0.
    """
    rows, columns = values.shape
    side = 2 * radius + 1
    out = np.empty((rows, columns), np.int16)
    for band in bands(rows):
        above, below = max(0, band.start - radius), min(rows, band.stop + radius)
        missing = (above - band.start + radius, band.stop + radius - below)
        part = np.pad(values[above:below], (missing, (radius, radius)), mode=border)
        part = part.astype(np.int16)
        height = band.stop - band.start
        tall = part[:height].copy()
        for shift in range(1, side):
            tall += part[shift : shift + height]
        wide = out[band]
        wide[:] = tall[:, :columns]
        for shift in range(1, side):
            wide += tall[:, shift : shift + columns]
    return out


def without_specks(cells: Bools, least: int, radius: int = 2) -> Bools:
    """True cells that have at least ``least`` True ones in the square around them, itself too."""
    return np.asarray(cells & (box_sum(cells, radius, "constant") >= least), np.bool_)
