"""Blocks of 16 x 16 samples times matrices, in vectors: the cosine transform and its way back.

docs/format.md, "Pixels". Source: discrete cosine transform, Ahmed, Natarajan, Rao, IEEE Trans.
Computers C-23 (1974). A matrix product, since at this size the vectors of a processor make it as
fast as a fast transform.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
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

BLOCK = 16
PLANES = 3
BANDS = BLOCK * BLOCK
SAMPLES = PLANES * BANDS

_ROW_BYTES = 4 * LANES


def cosines() -> npt.NDArray[np.float32]:
    """(16, 16): rows are the orthonormal cosines of rising frequency."""
    u, i = np.arange(BLOCK)[:, None], np.arange(BLOCK)
    matrix = np.sqrt(1 / 8) * np.cos(np.pi * (2 * i + 1) * u / 32)
    matrix[0] = 0.25
    return np.asarray(matrix, np.float32)


def _weighted_sum(builder: Any, weights: Any, rows: list[Any]) -> Any:
    """The sum of 16 vectors, each times one of the float32 at the address ``weights``."""
    # two sums, so that one product need not wait for the one before
    totals = []
    for k in range(BLOCK):
        value = splat(builder, load(builder, offset(builder, weights, 4 * k), REAL), REALS)
        if k < 2:
            totals.append(builder.fmul(value, rows[k]))
        else:
            totals[k % 2] = add_product(builder, totals[k % 2], value, rows[k])
    return builder.fadd(*totals)


def _rows_by_matrix(builder: Any, arguments: Any) -> None:
    """``count`` rows of 16 float32 times a matrix (16, 16) from the right; ``out`` may be
    ``source``. Rows are so many bytes apart as the pitches say."""
    source, source_pitch, count, matrix, out, out_pitch = arguments
    rows = [load(builder, offset(builder, matrix, _ROW_BYTES * k), REALS) for k in range(BLOCK)]
    with cgutils.for_range(builder, count) as loop:
        at = builder.add(source, builder.mul(loop.index, source_pitch))
        total = _weighted_sum(builder, at, rows)
        store(builder, total, builder.add(out, builder.mul(loop.index, out_pitch)))


def _matrix_by_rows(builder: Any, arguments: Any) -> None:
    """A matrix (16, 16) times 16 rows of 16 float32 at ``source``; ``out`` may be ``source``."""
    source, source_pitch, matrix, out, out_pitch = arguments
    rows = []
    at = source
    for _ in range(BLOCK):
        rows.append(load(builder, at, REALS))
        at = builder.add(at, source_pitch)
    with cgutils.for_range(builder, I64(BLOCK)) as loop:
        weights = builder.add(matrix, builder.mul(loop.index, I64(_ROW_BYTES)))
        total = _weighted_sum(builder, weights, rows)
        store(builder, total, builder.add(out, builder.mul(loop.index, out_pitch)))


rows_by_matrix = intrinsic_of(6, _rows_by_matrix)
matrix_by_rows = intrinsic_of(5, _matrix_by_rows)
