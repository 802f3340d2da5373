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

from wsicodec.entropy.simd import (
    I64,
    LANES,
    REAL,
    REALS,
    add_product,
    intrinsic_of,
    load,
    offset,
    splat,
    store,
)

HALF = 8

_VECTOR_BYTES = 4 * LANES


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


lap_across = intrinsic_of(5, _lap_across)


def border_matrix(turn: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """(16, 16): what turns a row of the samples around a border, left to right, into the filtered
    ones, multiplied from the right. turn: (8, 8), from the border outwards."""
    line = np.eye(2 * HALF)
    left, right = line[:, HALF - 1 :: -1], line[:, HALF:]
    odd = left - right
    change = (odd @ turn.astype(np.float64).T - odd) / 2
    after = np.concatenate([(left + change)[:, ::-1], right - change], axis=1)
    return np.ascontiguousarray(after, np.float32)
