"""From latents to pixels: corrections, inverse cosine transform, lapping, colours, rounding.

Row of blocks by row of blocks, so that everything between latents and bytes stays in the nearest
caches. docs/format.md, "Pixels", gives the arithmetic.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba.core import cgutils

from wsicodec.codec.colours import Turn, turn_matrix
from wsicodec.codec.cosine import BANDS, BLOCK, PLANES, cosines, matrix_by_rows, rows_by_matrix
from wsicodec.codec.lapping import HALF, border_matrix, lap_across
from wsicodec.entropy.compiled import compiled
from wsicodec.entropy.simd import (
    I8,
    I64,
    INTEGERS,
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

if TYPE_CHECKING:
    from wsicodec.models.decoder import DecoderModel

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]

_VECTOR_BYTES = 4 * LANES
_BAND_ROWS = BLOCK + HALF


def _to_bytes(builder: Any, arguments: Any) -> None:
    """``vectors`` times 16 pixels of three planes to RGB uint8 at ``out``.

    planes: address of the first, the others ``apart`` bytes on. colours: float32 (3, 4), what the
    planes give each of red, green and blue, and what is added.
    """
    planes, apart, colours, vectors, out = arguments
    rint = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(REALS, [REALS]), "llvm.rint.v16f32"
    )
    low, high = (splat(builder, ir.Constant(REAL, x), REALS) for x in (0.0, 255.0))
    weights = [
        [
            splat(builder, load(builder, offset(builder, colours, 4 * (4 * c + k)), REAL), REALS)
            for k in range(4)
        ]
        for c in range(3)
    ]
    bytes_kind = ir.VectorType(I8, LANES)
    with cgutils.for_range(builder, vectors) as loop:
        at = builder.add(planes, builder.mul(loop.index, I64(_VECTOR_BYTES)))
        samples = []
        for _ in range(PLANES):
            samples.append(load(builder, at, REALS))
            at = builder.add(at, apart)
        narrow = []
        for row in weights:
            x = row[3]
            for sample, weight in zip(samples, row, strict=False):
                x = add_product(builder, x, sample, weight)
            # in this order numbers that are none become 0
            x = builder.select(builder.fcmp_ordered(">", x, low), x, low)
            x = builder.select(builder.fcmp_ordered("<", x, high), x, high)
            whole = builder.fptosi(builder.call(rint, [x]), INTEGERS)
            narrow.append(builder.trunc(whole, bytes_kind))
        pair = [*range(LANES), *range(LANES, 2 * LANES)]
        kind = ir.VectorType(ir.IntType(32), len(pair))
        first = builder.shuffle_vector(narrow[0], narrow[1], ir.Constant(kind, pair))
        second = shuffle(builder, narrow[2], [*range(LANES), *[0] * LANES])
        mixed = [2 * LANES + n // 3 if n % 3 == 2 else n // 3 + LANES * (n % 3) for n in range(48)]
        kind = ir.VectorType(ir.IntType(32), len(mixed))
        rgb = builder.shuffle_vector(first, second, ir.Constant(kind, mixed))
        store(builder, rgb, builder.add(out, builder.mul(loop.index, I64(3 * LANES))))


to_bytes = intrinsic_of(5, _to_bytes)


@dataclass(frozen=True, eq=False)
class Brush:
    """What ``paint`` reads of a model.

    order: (channels,) int64, where a latent lies among the 768 of a block. frequencies: (16, 16),
    a cosine a row; samples: transposed. border: ``border_matrix`` of the lapping, turn: the
    lapping itself; lapped: whether it does anything.
    """

    order: npt.NDArray[np.int64]
    frequencies: Floats
    samples: Floats
    border: Floats
    turn: Floats
    lapped: bool

    def arguments(self) -> tuple[Any, ...]:
        """For compiled code."""
        return (
            self.order, self.frequencies, self.samples, self.border, self.turn, self.lapped
        )  # fmt: skip


@functools.lru_cache(maxsize=4)
def brush_of(model: DecoderModel) -> Brush:
    """What ``paint`` reads of a model."""
    frequencies = cosines()
    return Brush(
        model.order.astype(np.int64),
        frequencies,
        np.ascontiguousarray(frequencies.T),
        border_matrix(model.lapping),
        model.lapping,
        bool((model.lapping != np.eye(HALF)).any()),
    )


@compiled
def mixed_colours(matrix, mean, a, b, c):
    """``colours_of`` in compiled code, from the model's matrix and mean and three angles."""
    turn = turn_matrix(a, b, c)
    colours = np.empty((3, 4), np.float32)
    for i in range(3):
        for k in range(3):
            total = np.float64(0)
            for j in range(3):
                total += np.float64(matrix[i, j]) * turn[k, j]
            colours[i, k] = np.float32(total)
        colours[i, 3] = np.float32(np.float64(mean[i]) + 128)
    return colours


def colours_of(model: DecoderModel, turn: Turn) -> Floats:
    """(3, 4): what a cell's planes give each of red, green and blue, and what is added to them."""
    return np.asarray(mixed_colours(model.colours, model.mean, *turn))


@compiled
def paint(y, correction, contexts, gains, steps, columns, brush, colours, out):
    """Pixels of a cell.

    y: (channels, positions) float32 latents. correction: (positions, ``contexts``) uint8, rows
    contiguous, 128 is zero. gains: (positions,) uint8. steps: (256,). columns: of positions.
    brush: ``Brush.arguments``. colours: ``colours_of``. out: (height, width * 3) uint8, to which
    blocks are cropped.
    """
    order, frequencies, samples, border, turn, lapped = brush
    height, width = out.shape[0], out.shape[1] // 3
    channels = y.shape[0]
    rows = (height + BLOCK - 1) // BLOCK
    # the lower half of the blocks above and the blocks at hand: what one border needs
    line = BLOCK * columns
    band = np.empty((3 * _BAND_ROWS, line), np.float32)
    plane_size = _BAND_ROWS * line * 4
    pitch = line * 4
    blocks = np.zeros((columns + 1, 3 * BANDS), np.float32)  # the last is for what is half done
    scales = np.empty(columns, np.float32)
    last = np.empty(3 * line, np.uint8)
    # addresses once: views of arrays that threads share count their users, which takes turns
    band_at, blocks_at, last_at = band.ctypes.data, blocks.ctypes.data, last.ctypes.data
    half_at = blocks_at + 4 * 3 * BANDS * columns
    frequencies_at, samples_at = frequencies.ctypes.data, samples.ctypes.data
    border_at, turn_at, colours_at = border.ctypes.data, turn.ctypes.data, colours.ctypes.data
    out_at = out.ctypes.data
    whole = width % LANES == 0
    vectors = (width + LANES - 1) // LANES
    corrected = max(channels, contexts)
    for i in range(rows):
        first = i * columns
        for j in range(columns):
            scales[j] = steps[gains[first + j]] * np.float32(1 / 64)
        for c in range(corrected):
            at = order[c]
            if c >= contexts:
                for j in range(columns):
                    blocks[j, at] = y[c, first + j]
            elif c >= channels:
                for j in range(columns):
                    change = np.float32(correction[first + j, c]) - np.float32(128)
                    blocks[j, at] = change * scales[j]
            else:
                for j in range(columns):
                    change = np.float32(correction[first + j, c]) - np.float32(128)
                    blocks[j, at] = y[c, first + j] + change * scales[j]
        for p in range(PLANES):
            top = band_at + p * plane_size + HALF * pitch
            for j in range(columns):
                block = blocks_at + 4 * BANDS * (PLANES * j + p)
                rows_by_matrix(block, 4 * BLOCK, BLOCK, frequencies_at, half_at, 4 * BLOCK)
                matrix_by_rows(half_at, 4 * BLOCK, samples_at, top + 4 * BLOCK * j, pitch)
            if lapped:
                for j in range(1, columns):
                    edge = top + 4 * BLOCK * j - 4 * HALF
                    rows_by_matrix(edge, pitch, BLOCK, border_at, edge, pitch)
                if i:
                    lap_across(top - pitch, top, pitch, columns, turn_at)
        begin, end = HALF, _BAND_ROWS
        if lapped:
            begin = 0 if i else HALF
            end = _BAND_ROWS if i == rows - 1 else BLOCK
        for a in range(begin, end):
            row = BLOCK * i - HALF + a
            if row >= height:
                break
            source = band_at + a * pitch
            if whole:
                to_bytes(source, plane_size, colours_at, vectors, out_at + row * 3 * width)
            else:
                to_bytes(source, plane_size, colours_at, vectors, last_at)
                out[row, :] = last[: 3 * width]
        if lapped:
            for p in range(PLANES):
                for a in range(HALF):
                    band[p * _BAND_ROWS + a] = band[p * _BAND_ROWS + BLOCK + a]
