"""Colour axes of a cell: three planes, turned so that stains share as little as they can.

Stains differ from slide to slide, and with them what the colours of a picture have in common. The
planes of a cell (a fixed matrix of the model makes them of RGB) are therefore turned by three
angles that travel with it. docs/format.md, "Pixels".
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from wsicodec.entropy.compiled import compiled

ANGLE = math.pi / 256
"""Radians in a unit of a turn's angles, -128 ... 127."""

PLAIN = (0, 0, 0)
"""The turn that leaves planes as they are."""

SHARE = 0.2
"""Of a squared step: the variance at which a band of frequencies begins to cost bits."""

TURN_STEP = 18.0
"""A quantisation step near the default quality's. Turns for finer ones differ little, but where two
planes are nearly alike they may change places."""

STRIDES = (32, 16, 8, 4, 2, 1)

Turn = tuple[int, int, int]


@compiled
def turn_matrix(a, b, c):
    """``rotation`` in compiled code, from three angles in units."""
    ca, sa = math.cos(a * ANGLE), math.sin(a * ANGLE)
    cb, sb = math.cos(b * ANGLE), math.sin(b * ANGLE)
    cc, sc = math.cos(c * ANGLE), math.sin(c * ANGLE)
    matrix = np.empty((3, 3), np.float64)
    matrix[0, 0], matrix[0, 1], matrix[0, 2] = cb * ca, cb * sa, sb
    matrix[1, 0], matrix[1, 1] = -cc * sa - sc * sb * ca, cc * ca - sc * sb * sa
    matrix[1, 2] = sc * cb
    matrix[2, 0], matrix[2, 1] = sc * sa - cc * sb * ca, -sc * ca - cc * sb * sa
    matrix[2, 2] = cc * cb
    return matrix


def rotation(turn: Turn) -> npt.NDArray[np.float64]:
    """(3, 3), rows the new axes: planes 0 and 1 turned by the first angle, 0 and 2 by the second,
    1 and 2 by the third."""
    return np.asarray(turn_matrix(*turn))


@compiled
def _cost(bands, turn):
    """Bits of bands (n, 6: covariances 00 01 02 11 12 22, in thresholds) turned by angles."""
    matrix = turn_matrix(turn[0], turn[1], turn[2])
    total = np.float64(0)
    for i in range(bands.shape[0]):
        m = bands[i]
        product = np.float64(1)
        for k in range(3):
            x, y, z = matrix[k, 0], matrix[k, 1], matrix[k, 2]
            v = x * x * m[0] + y * y * m[3] + z * z * m[5]
            v += 2 * (x * y * m[1] + x * z * m[2] + y * z * m[4])
            product *= 1 + max(v, np.float64(0))
        total += np.log2(product)
    return total


@compiled
def _descend(bands, strides, turn):
    """Move ``turn``, three angles, downhill, by ever smaller strides."""
    least = _cost(bands, turn)
    for stride in strides:
        moved = True
        while moved:
            moved = False
            for k in range(3):
                for way in (-stride, stride):
                    before = turn[k]
                    turn[k] = before + way
                    if turn[k] > 127:
                        turn[k] -= 256
                    if turn[k] < -128:
                        turn[k] += 256
                    cost = _cost(bands, turn)
                    if cost < least - 1e-9:
                        least, moved = cost, True
                    else:
                        turn[k] = before
    return least


def best_turn(covariance: npt.NDArray[Any], step: float) -> Turn:
    """The turn after which planes take the fewest bits, were they normal.

    covariance: (bands, 3, 3) of the planes, band by band of frequencies. step: of quantisation.
    """
    i, j = np.triu_indices(3)
    bands = np.ascontiguousarray(covariance[:, i, j], np.float64) / (SHARE * step * step)
    turn = np.zeros(3, np.int64)
    _descend(bands, np.array(STRIDES), turn)
    return int(turn[0]), int(turn[1]), int(turn[2])
