"""One cell of a learned tile: symbols <-> latents, the same steps for encoder and decoder.

A cell is at most 512 x 512 pixels. Encoder and decoder differ in one thing only: where symbols
come from, the quantiser or the stream. Everything else, ``code_cells``, they share, so they cannot
drift apart. docs/format.md, "Learned payload", gives the arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from wsicodec.codec.protocol import Image
from wsicodec.entropy.kernel import compiled
from wsicodec.errors import FormatError
from wsicodec.models.decoder import STEP_PEAK, Z_PEAK, DecoderModel, lattice_mask

CELL = 512
BLOCK = 16
SAMPLES = 3 * BLOCK * BLOCK
SYMBOL_PEAK = 2**20
STEPS_PER_OCTAVE = 32
SPARSE_SHARE = 0.2
TOP_STEP = 64.0  # quantisation step at gain index 0

# docs/format.md, "Gain": round(2**15 * 2**(i / 32)), literals of the format
OCTAVE_TABLE = np.array(
    [
        32768, 33486, 34219, 34968, 35734, 36516, 37316, 38133, 38968, 39821, 40693, 41584, 42495,
        43425, 44376, 45348, 46341, 47356, 48393, 49452, 50535, 51642, 52773, 53928, 55109, 56316,
        57549, 58809, 60097, 61413, 62757, 64132,
    ],
    np.int64,
)  # fmt: skip

Array = npt.NDArray[Any]


def steps_of_gains() -> npt.NDArray[np.float32]:
    """(256,): the quantisation step of each gain index, for pixels only."""
    return (TOP_STEP * 2.0 ** (-np.arange(256) / STEPS_PER_OCTAVE)).astype(np.float32)


STEPS = steps_of_gains()


@compiled
def _dequantise(
    symbols, means, lattice, gains, octave, mean_factor, context_factor, inverse_gain, steps,
    y, context
):  # fmt: skip
    """Symbols of one stage to latents ``y`` (channels, positions) and context integers, on the
    positions of its lattice.

    Integers: v = 16 q + mean, in sixteenths of a step. Returns False for a symbol out of range.
    """
    channels, positions = symbols.shape
    with_mean = means.shape[0] > 0
    with_context = context.shape[0] > 0
    # what depends on the position alone
    where = np.empty(positions, np.int32)
    size = np.empty(positions, np.float32)
    mean_octave = np.empty(positions, np.int64)
    context_octave = np.empty(positions, np.int64)
    context_shift = np.empty(positions, np.int64)
    used = 0
    for p in range(positions):
        if lattice[p]:
            e = np.int64(gains[p])
            r = 255 - e
            where[used] = p
            size[used] = steps[e] * np.float32(1 / 16)
            mean_octave[used] = octave[e & 31] << (e >> 5)  # then all shifts are by 31
            context_octave[used] = octave[r & 31]
            context_shift[used] = 35 - (r >> 5)
            used += 1
    for c in range(channels):
        scale = inverse_gain[c]
        for i in range(used):
            p = where[i]
            q = np.int64(symbols[c, p])
            if q > SYMBOL_PEAK or q < -SYMBOL_PEAK:
                return False
            v = q * 16
            if with_mean:
                m = np.int64(means[c, p]) * mean_factor[c] * mean_octave[i]
                v += (m + (np.int64(1) << 30)) >> 31
            if v == 0:
                y[c, p] = np.float32(0)
                if with_context:
                    context[c, p] = np.float32(0)
                continue
            y[c, p] = np.float32(v) * scale * size[i]
            if with_context:
                shift = context_shift[i]
                k = v * context_factor[c] * context_octave[i] + (np.int64(1) << (shift - 1))
                context[c, p] = np.float32(min(max(k >> shift, -127), 127))
    return True


@compiled
def _quantise(
    y, classes, means, gains, octave, mean_factor, inverse_gain, steps,
    class_table, class_raw, radii, bits, lagrange, symbols
):  # fmt: skip
    """Symbols of latents ``y`` (channels, positions), 0 in class 0.

    Takes the nearest symbol, or one nearer to zero where that saves more bits than the channel's
    ``lagrange`` times the squared error that it adds (in steps); infinite: always the nearest.
    """
    channels, positions = y.shape
    with_mean = means.shape[0] > 0
    for c in range(channels):
        gain = np.float32(1) / inverse_gain[c]
        worth = lagrange[c]
        for p in range(positions):
            k = classes[c, p]
            if k == 0:
                symbols[c, p] = 0
                continue
            e = np.int64(gains[p])
            v = y[c, p] * gain / steps[e]
            if with_mean and means[c, p] != 0:
                shift = 31 - (e >> 5)
                product = np.int64(means[c, p]) * mean_factor[c] * octave[e & 31]
                m = (product + (np.int64(1) << (shift - 1))) >> shift
                v -= np.float32(m) * np.float32(1 / 16)
            q = np.int64(min(max(np.rint(v), -SYMBOL_PEAK), SYMBOL_PEAK))
            t = class_table[k]
            r = np.int64(radii[t])
            if q != 0 and class_raw[k] == 0 and abs(q) <= r:
                best = q
                cost = bits[t, q + r] + worth * (v - q) * (v - q)
                for _ in range(2):
                    q += -1 if q > 0 else 1
                    other = bits[t, q + r] + worth * (v - q) * (v - q)
                    if other < cost:
                        best, cost = q, other
                    if q == 0:
                        break
                q = best
            symbols[c, p] = q


@compiled
def _accumulate(y, basis, linear):
    """Add ``y`` (channels, positions), mostly zeros, times ``basis`` (channels, 768) to
    ``linear`` (positions, 768)."""
    channels, positions = y.shape
    samples = basis.shape[1]
    for c in range(channels):
        row = basis[c]
        for p in range(positions):
            value = y[c, p]
            if value != 0:
                target = linear[p]
                for n in range(samples):
                    target[n] += value * row[n]


@compiled
def _assemble(linear, correction, gains, steps, columns, out):
    """Pixels: round(linear + correction * step / 64), clipped to 0 ... 255, cropped to ``out``.

    linear: (positions, 768) float32, correction: (positions, 768) int8, block samples in (row,
    column, colour) order; out: (height, width * 3) uint8.
    """
    height, width = out.shape
    for i in range((height + 15) // 16):
        rows = min(16, height - 16 * i)
        for j in range(columns):
            used = min(48, width - 48 * j)
            p = i * columns + j
            scale = steps[gains[p]] * np.float32(1 / 64)
            for a in range(rows):
                target = out[16 * i + a, 48 * j : 48 * j + used]
                base = linear[p, 48 * a : 48 * a + used]
                change = correction[p, 48 * a : 48 * a + used]
                for n in range(used):
                    x = base[n] + np.float32(change[n]) * scale
                    target[n] = np.uint8(np.rint(min(max(x, np.float32(0)), np.float32(255))))


@dataclass(frozen=True, eq=False)
class CellShape:
    """Extent of a cell: pixels, latent grid and hyper-latent grid."""

    height: int
    width: int

    @property
    def latents(self) -> tuple[int, int]:
        return -(-self.height // BLOCK), -(-self.width // BLOCK)

    @property
    def hyper(self) -> tuple[int, int]:
        rows, columns = self.latents
        return -(-rows // 2), -(-columns // 2)


@dataclass(frozen=True, eq=False)
class CellLatents:
    """What a coded cell holds once all symbols are known.

    y: (coded channels, positions) float32. context: (context channels, positions) float32
    integers. gains: (positions,) uint8 effective gain indices.
    """

    shape: CellShape
    stages: int
    y: npt.NDArray[np.float32]
    context: npt.NDArray[np.float32]
    gains: npt.NDArray[np.uint8]


Classes = npt.NDArray[np.uint8]
Symbols = npt.NDArray[np.int32]
HyperSource = Callable[[Classes], Symbols]
"""Classes (z channels, rows, columns) to hyper-latent symbols of that shape."""
StageSource = Callable[[int, Classes, Array, Array], Symbols]
"""(stage, classes, means, gains) to symbols, arrays (channels, positions), gains (positions,)."""

_NO_MEANS = np.zeros((0, 0), np.int16)
_NO_FACTOR = np.zeros(0, np.int64)


@dataclass(frozen=True, eq=False)
class CellJob:
    """A cell to code: its gain index and where its symbols come from."""

    gain: int
    hyper_source: HyperSource
    stage_source: StageSource


def code_cells(
    model: DecoderModel, jobs: Sequence[CellJob], stages: int, shape: CellShape
) -> list[CellLatents]:
    """Walk through the symbols of cells of one shape in coding order, all cells at once.

    The sources encode or decode the symbols. A batch gives what its cells give one by one: the
    networks are exact.
    """
    a = model.architecture
    if stages > len(a.stages):
        raise FormatError(f"tile has {stages} stages, its model {len(a.stages)}")
    rows, columns = shape.latents
    z_rows, z_columns = shape.hyper
    positions, count = rows * columns, len(jobs)
    z = np.empty((count, a.z_channels, z_rows, z_columns), np.float32)
    plane = np.empty((count, 1, 2 * z_rows, 2 * z_columns), np.float32)
    for n, job in enumerate(jobs):
        z_classes = np.empty(z.shape[1:], np.uint8)
        z_classes[...] = model.z_classes[job.gain][:, None, None]
        z[n] = job.hyper_source(z_classes)
        plane[n] = job.gain
    if np.abs(z).max() > Z_PEAK:
        raise FormatError("a hyper-latent is beyond its range")
    h, step = model.hyper({"z": z, "plane": plane})
    h = np.ascontiguousarray(h[:, :, :rows, :columns])
    delta = step[:, :, :rows, :columns].astype(np.int64)
    assert np.abs(delta).max() <= STEP_PEAK  # proved when the model was loaded
    effective = np.clip(plane[:, :, :rows, :columns].astype(np.int64) + delta, 0, 255)
    gains = effective.astype(np.uint8).reshape(count, positions)
    plane = effective.astype(np.float32)
    y = np.zeros((count, a.channels_of(stages), positions), np.float32)
    context = np.zeros((count, a.context_channels, positions), np.float32)
    grid = context.reshape(count, a.context_channels, rows, columns)
    for k, stage in enumerate(a.stages[:stages]):
        inputs = {"h": h, "plane": plane}
        if k:
            inputs["context"] = grid[:, : a.seen(k)]
        outputs = model.stages[k](inputs)
        lattice = lattice_mask(stage.lattice, rows, columns)
        with_means, with_context = k < a.mean_stages, stage.first < a.context_channels
        for n, job in enumerate(jobs):
            classes = outputs[0][n].reshape(stage.count, positions)
            means = outputs[1][n].reshape(stage.count, positions) if with_means else _NO_MEANS
            if stage.lattice:
                classes *= lattice  # class 0: neither coded nor decoded
            symbols = job.stage_source(k, classes, means, gains[n])
            fine = _dequantise(
                symbols, means, lattice, gains[n], OCTAVE_TABLE,
                model.mean_factor[stage.channels] if with_means else _NO_FACTOR,
                model.context_factor[stage.channels],
                model.inverse_gain[stage.channels],
                STEPS, y[n, stage.channels],
                context[n, stage.channels] if with_context else context[n, :0],
            )  # fmt: skip
            if not fine:
                raise FormatError("a symbol is beyond the format's range")
    return [CellLatents(shape, stages, y[n], context[n], gains[n]) for n in range(count)]


def quantise_stage(
    model: DecoderModel,
    stage: int,
    y: npt.NDArray[np.float32],
    classes: Classes,
    means: Array,
    gains: Array,
    lagrange: npt.NDArray[np.float32],
) -> Symbols:
    """Symbols of one stage's latents ``y`` (channels, positions).

    lagrange: (channels,) bits that a squared error of one step is worth; infinite: the nearest.
    """
    a, t = model.architecture, model.tables
    channels = a.stages[stage].channels
    symbols = np.empty(classes.shape, np.int32)
    _quantise(
        y, classes, means, gains, OCTAVE_TABLE,
        model.mean_factor[channels] if stage < a.mean_stages else _NO_FACTOR,
        model.inverse_gain[channels], STEPS,
        t.class_table, t.class_raw, t.radii, t.bits, lagrange, symbols,
    )  # fmt: skip
    return symbols


def inverse_transform(model: DecoderModel, cell: CellLatents) -> npt.NDArray[np.float32]:
    """(positions, 768) samples plus 128, before the correction.

    Channels without means are mostly zero: adding the rows of the others alone takes less time
    than a full product, until about a fifth of them are set.
    """
    a = model.architecture
    first = min(len(cell.y), a.channels_of(max(1, a.mean_stages)))
    sparse = cell.y[first:]
    if np.count_nonzero(sparse) > SPARSE_SHARE * sparse.size:
        return model.linear(len(cell.y))({"y": cell.y})[0]
    linear = model.linear(first)({"y": cell.y[:first]})[0]
    _accumulate(sparse, model.basis[first : first + len(sparse)], linear)
    return linear


def synthesise(model: DecoderModel, cells: Sequence[CellLatents], outs: Sequence[Image]) -> None:
    """Pixels of cells of one shape into ``outs``, (height, width, 3) each."""
    rows, columns = cells[0].shape.latents
    channels = model.architecture.context_channels
    context = np.empty((len(cells), channels + 1, rows, columns), np.uint8)
    for n, cell in enumerate(cells):
        context[n, :-1] = cell.context.reshape(-1, rows, columns) + 128
        # the gain plane on the same grid: clip(E - 128, -127, 127) + 128
        context[n, -1] = np.maximum(cell.gains.reshape(rows, columns), 1)
    corrections = model.chain({"context": context})[0]
    for cell, correction, out in zip(cells, corrections, outs, strict=True):
        linear = inverse_transform(model, cell)
        block = correction.reshape(-1, SAMPLES)
        if out.flags.c_contiguous:
            _assemble(linear, block, cell.gains, STEPS, columns, out.reshape(len(out), -1))
        else:  # a cell within a larger tile
            whole = np.empty((cell.shape.height, 3 * cell.shape.width), np.uint8)
            _assemble(linear, block, cell.gains, STEPS, columns, whole)
            out[...] = whole.reshape(out.shape)


def cells_of(height: int, width: int) -> list[tuple[int, int, CellShape]]:
    """(top, left, shape) of a tile's cells in coding order: rows of 512-pixel cells."""
    return [
        (top, left, CellShape(min(CELL, height - top), min(CELL, width - left)))
        for top in range(0, height, CELL)
        for left in range(0, width, CELL)
    ]
