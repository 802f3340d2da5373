"""8-bit dot products of AVX-512 (VNNI) in compiled code: the inner loop of integer networks.

One call gives four positions and 16 ... 64 outputs of a convolution of any kernel: sums in int32,
started at the bias, then ``clip(rint(sum * scale), low, high) + zero``. A convolution reads
*segments*: for every tap of its kernel and every tensor that it sees, so many channels of the
position that the tap falls on. Sums are exact, and proved small enough that their scaling in
float32 is.

``vpdpbusd`` has no equivalent in NumPy, and compilers do not find it in loops of this shape, so the
loop is written in LLVM's intermediate language. ``available`` says where it runs.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils

from wsicodec.entropy.simd import (
    I8,
    I16,
    I32,
    I64,
    INTEGERS,
    LANES,
    REAL,
    REALS,
    compiled_for,
    cpu_flags,
    intrinsic_of,
    load,
    offset,
    splat,
    store,
)

POSITIONS = 4
"""Positions of one call."""
WIDTH = LANES
"""Outputs of one vector register."""
VECTORS = 4
"""Vector registers of outputs in the widest call."""


INSTRUCTIONS = frozenset(("avx512f", "avx512bw", "avx512_vnni"))


def available() -> bool:
    """Whether this machine has the instructions (Linux on x86 tells), and code is compiled for
    them: for another target than the machine itself LLVM ends the process."""
    return cpu_flags() >= INSTRUCTIONS and compiled_for(INSTRUCTIONS)


def _dot_products(vectors: int, wide: bool) -> Any:
    """The intrinsic for ``vectors`` registers of outputs, stored as uint8, or int16 if ``wide``.

    Arguments: ``segments`` of ``count`` rows (int64: address of position 0, bytes from one position
    to the next, groups of four channels), four ``positions`` and four ``targets`` (int64),
    ``weights`` (segment by segment; 64 bytes for each register and group of four channels),
    ``bias`` int32, ``scale`` float32, and the output's bounds and zero point.
    """
    narrow = ir.VectorType(I16 if wide else I8, LANES)
    step = 64

    def dot_products(builder: Any, arguments: Any) -> None:
        segments, count, positions, targets, weights, bias, scale, low, high, zero = arguments
        dot = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(INTEGERS, [INTEGERS] * 3),
            "llvm.x86.avx512.vpdpbusd.512",
        )
        rint = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(REALS, [REALS]), "llvm.rint.v16f32"
        )
        sums = [
            [cgutils.alloca_once(builder, INTEGERS) for _ in range(vectors)]
            for _ in range(POSITIONS)
        ]
        for v in range(vectors):
            start = load(builder, offset(builder, bias, step * v), INTEGERS)
            for m in range(POSITIONS):
                builder.store(start, sums[m][v])
        where = [load(builder, offset(builder, positions, 8 * m), I64) for m in range(POSITIONS)]
        weight = cgutils.alloca_once_value(builder, weights)
        with cgutils.for_range(builder, count) as outer:
            row = builder.add(segments, builder.mul(outer.index, I64(24)))
            base, stride, groups = (
                load(builder, offset(builder, row, 8 * n), I64) for n in range(3)
            )
            sources = [builder.add(base, builder.mul(w, stride)) for w in where]
            with cgutils.for_range(builder, groups) as inner:
                group = builder.mul(inner.index, I64(4))
                panel = builder.load(weight)
                b = [
                    load(builder, offset(builder, panel, step * v), INTEGERS)
                    for v in range(vectors)
                ]
                builder.store(offset(builder, panel, step * vectors), weight)
                for m in range(POSITIONS):
                    four = load(builder, builder.add(sources[m], group), I32)
                    a = splat(builder, four, INTEGERS)
                    for v in range(vectors):
                        total = builder.call(dot, [builder.load(sums[m][v]), a, b[v]])
                        builder.store(total, sums[m][v])
        lowest, highest = (splat(builder, builder.sitofp(x, REAL), REALS) for x in (low, high))
        added = splat(builder, builder.trunc(zero, I32), INTEGERS)
        size = LANES * (2 if wide else 1)
        for v in range(vectors):
            factor = load(builder, offset(builder, scale, step * v), REALS)
            for m in range(POSITIONS):
                x = builder.sitofp(builder.load(sums[m][v]), REALS)
                x = builder.call(rint, [builder.fmul(x, factor)])
                x = builder.select(builder.fcmp_ordered("<", x, lowest), lowest, x)
                x = builder.select(builder.fcmp_ordered(">", x, highest), highest, x)
                whole = builder.add(builder.fptosi(x, INTEGERS), added)
                target = load(builder, offset(builder, targets, 8 * m), I64)
                store(builder, builder.trunc(whole, narrow), offset(builder, target, size * v))

    return intrinsic_of(10, dot_products)


DOT_UINT8 = tuple(_dot_products(n, False) for n in range(1, VECTORS + 1))
DOT_INT16 = tuple(_dot_products(n, True) for n in range(1, VECTORS + 1))
