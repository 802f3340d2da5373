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
from wsicodec.entropy.compiled import compiled
from wsicodec.entropy.tables import SYMBOL_PEAK
from wsicodec.entropy.trellis import search_levels
from wsicodec.errors import FormatError
from wsicodec.models.decoder import STEP_PEAK, Z_PEAK, DecoderModel
from wsicodec.models.lattice import lattice_positions

CELL = 512
BLOCK = 16
SAMPLES = 3 * BLOCK * BLOCK
LEVEL_PEAK = 2 * SYMBOL_PEAK
INDEX_PEAK = SYMBOL_PEAK - 2  # searches look at neighbours
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
    levels, means, where, gains, octave, mean_factor, context_factor, inverse_gain, steps,
    y, context
):  # fmt: skip
    """Levels (channels, positions of the lattice) of one stage to latents ``y`` (channels,
    positions) and to context integers and their magnitudes (2, channels, positions; 128 is zero),
    on the positions ``where``.

    Integers: v = 8 level + mean, in sixteenths of a step. Returns False for a level out of range.
    """
    channels, used = levels.shape
    with_mean = means.shape[0] > 0
    with_context = context.shape[1] > 0
    # what depends on the position alone
    size = np.empty(used, np.float32)
    mean_octave = np.empty(used, np.int64)
    context_octave = np.empty(used, np.int64)
    context_shift = np.empty(used, np.int64)
    for i in range(used):
        e = np.int64(gains[where[i]])
        r = 255 - e
        size[i] = steps[e] * np.float32(1 / 16)
        mean_octave[i] = octave[e & 31] << (e >> 5)  # then all shifts are by 31
        context_octave[i] = octave[r & 31]
        context_shift[i] = 35 - (r >> 5)
    for c in range(channels):
        scale = inverse_gain[c]
        for i in range(used):
            p = where[i]
            v = np.int64(levels[c, i])
            if v > LEVEL_PEAK or v < -LEVEL_PEAK:
                return False
            v *= 8
            if with_mean:
                m = np.int64(means[c, i]) * mean_factor[c] * mean_octave[i]
                v += (m + (np.int64(1) << 30)) >> 31
            if v == 0:
                continue
            y[c, p] = np.float32(v) * scale * size[i]
            if with_context:
                shift = context_shift[i]
                k = v * context_factor[c] * context_octave[i] + (np.int64(1) << (shift - 1))
                k = min(max(k >> shift, -127), 127)
                context[0, c, p] = np.uint8(k + 128)
                context[1, c, p] = np.uint8(abs(k) + 128)
    return True


@compiled
def _residuals(
    y, where, classes, means, gains, octave, mean_factor, inverse_gain, steps, residuals
):
    """Latents ``y`` (channels, positions) at ``where`` less their means, in steps."""
    channels, used = residuals.shape
    with_mean = means.shape[0] > 0
    for c in range(channels):
        gain = np.float32(1) / inverse_gain[c]
        for i in range(used):
            if classes[c, i] == 0:
                residuals[c, i] = np.float32(0)
                continue
            p = where[i]
            e = np.int64(gains[p])
            v = y[c, p] * gain / steps[e]
            if with_mean and means[c, i] != 0:
                shift = 31 - (e >> 5)
                product = np.int64(means[c, i]) * mean_factor[c] * octave[e & 31]
                m = (product + (np.int64(1) << (shift - 1))) >> shift
                v -= np.float32(m) * np.float32(1 / 16)
            residuals[c, i] = min(max(v, np.float32(-INDEX_PEAK)), np.float32(INDEX_PEAK))


@compiled
def _accumulate(y, basis, linear):
    """Add ``y`` (channels, positions), mostly zeros, times ``basis`` (channels, 768) to
    ``linear`` (positions, 768)."""
    channels, positions = y.shape
    samples = basis.shape[1]
    # position by position, four rows at once: a block of samples stays in the nearest cache
    count = np.zeros(positions, np.int64)
    rows = np.zeros((positions, channels + 3), np.uint16)
    values = np.zeros((positions, channels + 3), np.float32)
    for c in range(channels):
        for p in range(positions):
            n = count[p]
            rows[p, n] = c
            values[p, n] = y[c, p]
            count[p] = n + (y[c, p] != 0)
    for p in range(positions):
        n = count[p]
        values[p, n : n + 3] = np.float32(0)
        target = linear[p]
        for i in range(0, n, 4):
            v0, v1, v2, v3 = values[p, i], values[p, i + 1], values[p, i + 2], values[p, i + 3]
            r0, r1 = basis[rows[p, i]], basis[rows[p, i + 1]]
            r2, r3 = basis[rows[p, i + 2]], basis[rows[p, i + 3]]
            for k in range(samples):
                target[k] += (v0 * r0[k] + v1 * r1[k]) + (v2 * r2[k] + v3 * r3[k])


@compiled
def _assemble(linear, correction, gains, steps, columns, out):
    """Pixels: round(linear + (correction - 128) * step / 64), clipped to 0 ... 255.

    linear: (positions, 768) float32, correction: (positions, 768) uint8, 128 is zero; samples in
    (row, column, colour) order. out: (height, width * 3) uint8, to which blocks are cropped.
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
                    x = base[n] + (np.float32(change[n]) - np.float32(128)) * scale
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

    y: (coded channels, positions) float32. context: (context channels + 1, rows, columns) uint8,
    what the chain takes. gains: (positions,) uint8 effective gain indices.
    """

    shape: CellShape
    stages: int
    y: npt.NDArray[np.float32]
    context: npt.NDArray[np.uint8]
    gains: npt.NDArray[np.uint8]


Classes = npt.NDArray[np.uint8]
Symbols = npt.NDArray[np.int32]
Levels = npt.NDArray[np.int32]
HyperSource = Callable[[Classes], Symbols]
"""Classes (z channels, rows, columns) to hyper-latent symbols of that shape."""
StageSource = Callable[[int, Classes, Array, Array], Levels]
"""(stage, classes, means, gains) to levels, arrays (channels, positions of the stage's lattice),
gains (positions,) of the whole grid."""

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
    plane = np.empty((count, 1, 2 * z_rows, 2 * z_columns), np.uint8)
    for n, job in enumerate(jobs):
        z_classes = np.empty(z.shape[1:], np.uint8)
        z_classes[...] = model.z_classes[job.gain][:, None, None]
        z[n] = job.hyper_source(z_classes)
        plane[n] = job.gain
    if np.abs(z).max() > Z_PEAK:
        raise FormatError("a hyper-latent is beyond its range")
    h, step = model.hyper({"z": z, "plane": plane})
    h = np.ascontiguousarray(h[:, :, :rows, :columns])
    delta = step[:, :, :rows, :columns].astype(np.int16)
    assert np.abs(delta).max() <= STEP_PEAK  # proved when the model was loaded
    plane = np.clip(plane[:, :, :rows, :columns] + delta, 0, 255).astype(np.uint8)
    gains = plane.reshape(count, positions)
    y = np.zeros((count, a.channels_of(stages), positions), np.float32)
    # context integers and their magnitudes, 128 more; below them the gain plane for the chain
    context = np.full((2, count, a.context_channels + 1, positions), 128, np.uint8)
    context[0, :, -1] = np.maximum(gains, 1)
    grid = context.reshape(2, count, -1, rows, columns)
    for k, stage in enumerate(a.stages[:stages]):
        inputs = {"h": h, "plane": plane}
        if k:
            inputs["context"], inputs["magnitude"] = grid[:, :, : a.seen(k)]
        outputs = model.stages[k](inputs)
        where = lattice_positions(stage.lattice, rows, columns)
        with_means, with_context = k < a.mean_stages, stage.first < a.context_channels
        for n, job in enumerate(jobs):
            classes, means = outputs[0][n], outputs[1][n] if with_means else _NO_MEANS
            levels = job.stage_source(k, classes, means, gains[n])
            fine = _dequantise(
                levels, means, where, gains[n], OCTAVE_TABLE,
                model.mean_factor[stage.channels] if with_means else _NO_FACTOR,
                model.context_factor[stage.channels],
                model.inverse_gain[stage.channels],
                STEPS, y[n, stage.channels],
                context[:, n, stage.channels] if with_context else context[:, n, :0],
            )  # fmt: skip
            if not fine:
                raise FormatError("a symbol is beyond the format's range")
    return [CellLatents(shape, stages, y[n], grid[0, n], gains[n]) for n in range(count)]


def quantise_stage(
    model: DecoderModel,
    stage: int,
    y: npt.NDArray[np.float32],
    where: npt.NDArray[np.int32],
    classes: Classes,
    means: Array,
    gains: Array,
    lagrange: npt.NDArray[np.float32],
    lanes: int,
) -> Levels:
    """Levels (channels, positions of the lattice) of one stage's latents ``y`` (channels,
    positions) at ``where``, the lattice.

    lagrange: (channels,) bits that a squared error of one step is worth; infinite: the nearest.
    """
    a = model.architecture
    channels = a.stages[stage].channels
    residuals = np.empty(classes.shape, np.float32)
    _residuals(
        y, where, classes, means, gains, OCTAVE_TABLE,
        model.mean_factor[channels] if stage < a.mean_stages else _NO_FACTOR,
        model.inverse_gain[channels], STEPS, residuals,
    )  # fmt: skip
    return search_levels(residuals, classes, lagrange, model.tables, lanes)


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
    columns = cells[0].shape.latents[1]
    corrections = model.chain({"context": np.stack([cell.context for cell in cells])})[0]
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
