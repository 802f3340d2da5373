"""Lapped blocks: the filter across block borders.

Around each border between two blocks lie sixteen samples. Sums of the two at equal distance from
it stay, their differences are turned by an orthogonal matrix: in the encoder before the block
transform, in the decoder by the transpose after the inverse. Rows and columns alike; blocks at the
edge of a cell have no border there. docs/format.md, "Pixels".

Source: time-domain lapped transforms, Tran, Liang, Tu, IEEE Trans. Signal Proc. 51 (2003).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba.core import cgutils

from wsicodec.entropy.compiled import compiled
from wsicodec.entropy.simd import (
    I64,
    LANES,
    REAL,
    REALS,
    add_product,
    intrinsic_of,
    load,
    offset,
    shuffle,
    splat,
    store,
)

BLOCK = 16
LINE = 3 * BLOCK  # samples of a row of a block
HALF = 8
WIDE = 3 * HALF

_LINE_BYTES = 4 * LINE
_VECTOR_BYTES = 4 * LANES


def _lap_between(builder: Any, arguments: Any) -> None:
    """Filter ``count`` samples around borders of blocks in one row of interleaved colours.

    border: address of the first border's right-hand sample; borders are 48 samples apart.
    weights: float32 (8, 24), ``line_weights``.
    """
    border, count, weights = arguments
    wide = ir.VectorType(REAL, WIDE)
    mirrored = [3 * (HALF - 1 - n // 3) + n % 3 for n in range(WIDE)]
    half = ir.Constant(wide, [0.5] * WIDE)
    with cgutils.for_range(builder, count) as loop:
        right = builder.add(border, builder.mul(loop.index, I64(_LINE_BYTES)))
        left = builder.sub(right, I64(4 * WIDE))
        a = load(builder, left, wide)
        b = shuffle(builder, load(builder, right, wide), mirrored)
        odd = builder.fsub(a, b)
        total = builder.fsub(ir.Constant(wide, [0.0] * WIDE), odd)
        for k in range(HALF):
            one = shuffle(builder, odd, [3 * k + n % 3 for n in range(WIDE)])
            weight = load(builder, offset(builder, weights, 4 * WIDE * k), wide)
            total = add_product(builder, total, one, weight)
        change = builder.fmul(total, half)
        store(builder, builder.fadd(a, change), left)
        store(builder, shuffle(builder, builder.fsub(b, change), mirrored), right)


def _lap_across(builder: Any, arguments: Any) -> None:
    """Filter eight rows above a border, to ``upper`` (the one that touches it), and eight below,
    from ``lower`` on, rows ``pitch`` bytes apart; ``vectors`` times 16 samples.

    turn: float32 (8, 8), rows and columns from the border outwards.
    """
    upper, lower, pitch, vectors, turn = arguments
    half = splat(builder, ir.Constant(REAL, 0.5), REALS)
    above = [upper]
    below = [lower]
    for _ in range(HALF - 1):
        above.append(builder.sub(above[-1], pitch))
        below.append(builder.add(below[-1], pitch))
    with cgutils.for_range(builder, vectors) as loop:
        shift = builder.mul(loop.index, I64(_VECTOR_BYTES))
        above_now = [builder.add(x, shift) for x in above]
        below_now = [builder.add(x, shift) for x in below]
        a = [load(builder, x, REALS) for x in above_now]
        b = [load(builder, x, REALS) for x in below_now]
        odd = [builder.fsub(x, y) for x, y in zip(a, b, strict=True)]
        for i in range(HALF):
            total = builder.fsub(ir.Constant(REALS, [0.0] * LANES), odd[i])
            for k in range(HALF):
                weight = load(builder, offset(builder, turn, 4 * (HALF * i + k)), REAL)
                total = add_product(builder, total, splat(builder, weight, REALS), odd[k])
            change = builder.fmul(total, half)
            store(builder, builder.fadd(a[i], change), above_now[i])
            store(builder, builder.fsub(b[i], change), below_now[i])


lap_between = intrinsic_of(3, _lap_between)
lap_across = intrinsic_of(5, _lap_across)


def line_weights(turn: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """(8, 24): what each of a line's eight differences, farthest first, adds to the eight."""
    matrix = turn[::-1, ::-1]
    return np.ascontiguousarray(np.repeat(matrix.T, 3, axis=1), np.float32)


@compiled
def lap_image(image, turn, weights):
    """Filter an image (rows * 16, columns * 48) float32 of interleaved colours across the borders
    of its blocks, in place. weights: ``line_weights`` of ``turn``."""
    height, width = image.shape
    base, pitch = image.ctypes.data, 4 * width
    for y in range(height):
        lap_between(base + y * pitch + 4 * LINE, width // LINE - 1, weights.ctypes.data)
    for y in range(BLOCK, height, BLOCK):
        at = base + y * pitch
        lap_across(at - pitch, at, pitch, width // LANES, turn.ctypes.data)
