"""From latents to pixels: inverse transform, correction, lapping and rounding, in one pass.

Row of blocks by row of blocks, so that everything between latents and bytes stays in the nearest
caches. The first ``dense`` channels are multiplied as matrices; the others, mostly zero, are added
one by one. docs/format.md, "Pixels", gives the arithmetic.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba.core import cgutils

from wsicodec.codec.lapping import HALF, LINE, lap_across, lap_between
from wsicodec.entropy.compiled import compiled
from wsicodec.entropy.simd import (
    I8,
    I64,
    INTEGERS,
    LANES,
    REAL,
    REALS,
    add_product,
    cpu_flags,
    intrinsic_of,
    load,
    offset,
    splat,
    store,
)

BLOCK = 16
VECTORS = LINE // LANES
GROUP = 8 if "avx512f" in cpu_flags() else 2
"""Blocks whose rows are computed at once: their sums have to fit the registers."""

Array = npt.NDArray[Any]

_LINE_BYTES = 4 * LINE
_VECTOR_BYTES = 4 * LANES


def _block_rows(builder: Any, arguments: Any) -> None:
    """One row of ``GROUP`` blocks side by side: bias + y . panel + (correction - 128) * scale.

    y: float32 (channels, ``pitch`` bytes apart), one value a block. panel: float32 (channels, 48).
    corrections: int64 addresses of 48 bytes, one a block. scales: float32, one a block. out: 48
    float32 a block.
    """
    y, channels, pitch, panel, bias, corrections, scales, out = arguments
    cells = [[cgutils.alloca_once(builder, REALS) for _ in range(VECTORS)] for _ in range(GROUP)]
    for v in range(VECTORS):
        start = load(builder, offset(builder, bias, _VECTOR_BYTES * v), REALS)
        for m in range(GROUP):
            builder.store(start, cells[m][v])
    with cgutils.for_range(builder, channels) as loop:
        row = builder.add(panel, builder.mul(loop.index, I64(_LINE_BYTES)))
        values = builder.add(y, builder.mul(loop.index, pitch))
        b = [load(builder, offset(builder, row, _VECTOR_BYTES * v), REALS) for v in range(VECTORS)]
        for m in range(GROUP):
            a = splat(builder, load(builder, offset(builder, values, 4 * m), REAL), REALS)
            for v in range(VECTORS):
                total = add_product(builder, builder.load(cells[m][v]), a, b[v])
                builder.store(total, cells[m][v])
    narrow = ir.VectorType(I8, LANES)
    middle = splat(builder, ir.Constant(REAL, 128.0), REALS)
    for m in range(GROUP):
        scale = splat(builder, load(builder, offset(builder, scales, 4 * m), REAL), REALS)
        levels = load(builder, offset(builder, corrections, 8 * m), I64)
        for v in range(VECTORS):
            level = load(builder, offset(builder, levels, LANES * v), narrow)
            change = builder.uitofp(builder.zext(level, INTEGERS), REALS)
            change = builder.fsub(change, middle)
            total = add_product(builder, builder.load(cells[m][v]), change, scale)
            store(builder, total, offset(builder, out, _LINE_BYTES * m + _VECTOR_BYTES * v))


def _sparse_rows(builder: Any, arguments: Any) -> None:
    """Add basis rows times values to a block in place.

    out: 16 rows of 48 float32, ``pitch`` bytes apart. rows: int64 addresses of ``count`` basis rows
    (768 float32). values: float32.
    """
    out, pitch, count, rows, values = arguments
    with cgutils.for_range(builder, I64(BLOCK)) as line:
        target = builder.add(out, builder.mul(line.index, pitch))
        shift = builder.mul(line.index, I64(_LINE_BYTES))
        cells = [
            cgutils.alloca_once_value(
                builder, load(builder, offset(builder, target, _VECTOR_BYTES * v), REALS)
            )
            for v in range(VECTORS)
        ]
        with cgutils.for_range(builder, count) as loop:
            at = builder.add(rows, builder.mul(loop.index, I64(8)))
            row = builder.add(load(builder, at, I64), shift)
            at = builder.add(values, builder.mul(loop.index, I64(4)))
            value = splat(builder, load(builder, at, REAL), REALS)
            for v in range(VECTORS):
                b = load(builder, offset(builder, row, _VECTOR_BYTES * v), REALS)
                total = add_product(builder, builder.load(cells[v]), value, b)
                builder.store(total, cells[v])
        for v in range(VECTORS):
            store(builder, builder.load(cells[v]), offset(builder, target, _VECTOR_BYTES * v))


def _to_bytes(builder: Any, arguments: Any) -> None:
    """``vectors`` times 16 float32 at ``source``, rounded and clipped to uint8 at ``out``."""
    source, vectors, out = arguments
    rint = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(REALS, [REALS]), "llvm.rint.v16f32"
    )
    low, high = (splat(builder, ir.Constant(REAL, x), REALS) for x in (0.0, 255.0))
    with cgutils.for_range(builder, vectors) as loop:
        x = load(builder, builder.add(source, builder.mul(loop.index, I64(_VECTOR_BYTES))), REALS)
        # in this order numbers that are none become 0
        x = builder.select(builder.fcmp_ordered(">", x, low), x, low)
        x = builder.select(builder.fcmp_ordered("<", x, high), x, high)
        whole = builder.fptosi(builder.call(rint, [x]), INTEGERS)
        narrow = builder.trunc(whole, ir.VectorType(I8, LANES))
        store(builder, narrow, builder.add(out, builder.mul(loop.index, I64(LANES))))


block_rows = intrinsic_of(8, _block_rows)
sparse_rows = intrinsic_of(5, _sparse_rows)
to_bytes = intrinsic_of(3, _to_bytes)


def panels_of(basis: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """(16, channels, 48): a basis (channels, 768) by rows of blocks."""
    rows = basis.reshape(len(basis), BLOCK, LINE).transpose(1, 0, 2)
    return np.ascontiguousarray(rows, np.float32)


@compiled
def paint(
    y, dense, basis, panels, mean, correction, gains, steps, columns, lapped, turn, weights, out
):
    """Pixels of a cell.

    y: (channels, positions) float32 latents. dense: leading channels to multiply as a matrix.
    basis: (channels, 768) float32; panels: ``panels_of`` it. mean: (768,), 128 added. correction:
    (positions, 768) uint8, rows contiguous, 128 is zero. gains: (positions,) uint8. steps: (256,).
    turn: (8, 8), weights: ``line_weights`` of it. out: (height, width * 3) uint8, to which blocks
    are cropped.
    """
    height, width = out.shape
    channels = y.shape[0]
    rows = (height + BLOCK - 1) // BLOCK
    padded = (columns + GROUP - 1) // GROUP * GROUP
    # the lower half of the blocks above and the blocks at hand: what one border needs
    band = np.empty((24, padded * LINE), np.float32)
    pitch = band.shape[1] * 4
    values = np.zeros((max(dense, 1), padded), np.float32)
    scales = np.zeros(GROUP, np.float32)
    levels = np.empty(GROUP, np.int64)
    row_at = np.empty(max(channels - dense, 1), np.int64)
    row_value = np.empty(max(channels - dense, 1), np.float32)
    line = np.empty(padded * LINE, np.uint8)
    # addresses once: views of arrays that threads share count their users, which takes turns
    corrections, stride = correction.ctypes.data, correction.strides[0]
    basis_at, panels_at, mean_at = basis.ctypes.data, panels.ctypes.data, mean.ctypes.data
    panel_size = panels.strides[0]
    values_at, levels_at, scales_at = values.ctypes.data, levels.ctypes.data, scales.ctypes.data
    rows_at, row_values_at = row_at.ctypes.data, row_value.ctypes.data
    turn_at, weights_at = turn.ctypes.data, weights.ctypes.data
    band_at, line_at, out_at = band.ctypes.data, line.ctypes.data, out.ctypes.data
    top_row = band_at + HALF * pitch
    for i in range(rows):
        first = i * columns
        for c in range(dense):
            for j in range(columns):
                values[c, j] = y[c, first + j]
        for j in range(0, padded, GROUP):
            for m in range(GROUP):
                p = first + min(j + m, columns - 1)
                scales[m] = steps[gains[p]] * np.float32(1 / 64)
                levels[m] = corrections + p * stride
            for a in range(BLOCK):
                block_rows(
                    values_at + 4 * j, dense, 4 * padded, panels_at + a * panel_size,
                    mean_at + 4 * LINE * a, levels_at, scales_at,
                    top_row + a * pitch + 4 * LINE * j,
                )  # fmt: skip
                for m in range(GROUP):
                    levels[m] += LINE
        if channels > dense:
            for j in range(columns):
                n = 0
                for c in range(dense, channels):
                    v = y[c, first + j]
                    row_at[n] = basis_at + c * 4 * BLOCK * LINE
                    row_value[n] = v
                    n += v != 0
                if n:
                    sparse_rows(top_row + 4 * LINE * j, pitch, n, rows_at, row_values_at)
        begin, end = 8, 24
        if lapped:
            for a in range(BLOCK):
                lap_between(top_row + a * pitch + 4 * LINE, columns - 1, weights_at)
            if i:
                above = top_row - pitch
                lap_across(above, top_row, pitch, columns * VECTORS, turn_at)
                begin = 0
            if i < rows - 1:
                end = 16
        for a in range(begin, end):
            row = 16 * i - 8 + a
            if row >= height:
                break
            source = band_at + a * pitch
            if width % LANES:
                to_bytes(source, (width + LANES - 1) // LANES, line_at)
                out[row, :] = line[:width]
            else:
                to_bytes(source, width // LANES, out_at + row * width)
        if lapped:
            band[:8] = band[16:]
