"""One cell of a learned tile: symbols <-> latents, the same steps for encoder and decoder.

A cell is at most 512 x 512 pixels. Encoder and decoder differ in one thing only: where symbols
come from, the quantiser or the stream. Everything else, ``code_cells``, they share, so they cannot
drift apart. docs/format.md, "Learned payload", gives the arithmetic.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from wsicodec.codec.colours import Turn
from wsicodec.codec.cosine import BLOCK
from wsicodec.codec.pixels import brush_of, colours_of, mixed_colours, paint
from wsicodec.codec.protocol import Image
from wsicodec.entropy.compiled import compiled
from wsicodec.entropy.kernel import BAD_ESCAPE, Decoder, check_status, decode_symbols
from wsicodec.entropy.tables import SYMBOL_PEAK
from wsicodec.entropy.trellis import PACKED, search_levels
from wsicodec.errors import FormatError
from wsicodec.models.decoder import Z_PEAK, Architecture, DecoderModel
from wsicodec.models.factors import OCTAVE_TABLE, Factors
from wsicodec.models.fused import run_program, run_stage
from wsicodec.models.lattice import lattice_positions
from wsicodec.models.networks import Cells, run_hyper

CELL = 512
LEVEL_PEAK = 2 * SYMBOL_PEAK
INDEX_PEAK = SYMBOL_PEAK - 2  # searches look at neighbours
STEPS_PER_OCTAVE = 32
BAD_HYPER = 100  # a status beside those of the entropy coder
TOP_STEP = 64.0  # quantisation step at gain index 0

Array = npt.NDArray[Any]


def steps_of_gains() -> npt.NDArray[np.float32]:
    """(256,): the quantisation step of each gain index, for pixels only."""
    return (TOP_STEP * 2.0 ** (-np.arange(256) / STEPS_PER_OCTAVE)).astype(np.float32)


STEPS = steps_of_gains()


@compiled
def _shift_classes(classes, shift):
    """Classes (channels, positions) of a tilted tile, in place: what is not coded stays so."""
    for c in range(classes.shape[0]):
        row, by = classes[c], np.int16(shift[c])
        if by == 0:
            continue
        for i in range(len(row)):
            moved = min(max(np.int16(row[i]) + by, np.int16(0)), np.int16(127))
            row[i] = np.uint8(moved if row[i] > 0 else 0)


@compiled
def _dequantise(
    levels, means, where, gains, octave, mean_factor, context_factor, inverse_gain, steps,
    y, context, magnitudes, places, base
):  # fmt: skip
    """Levels (channels, positions of the lattice) of one stage to latents ``y`` (channels,
    positions) and to context integers, 128 added, and their magnitudes, ``base`` added (channels,
    places of positions), on the positions ``where``.

    Integers: v = 8 level + mean, in sixteenths of a step. Returns False for a level out of range.
    """
    channels, used = levels.shape
    with_mean = means.shape[0] > 0
    with_context = context.shape[0] > 0
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
    # loops without branches or scattered stores, which compilers turn into vectors
    sixteenths = np.empty(used, np.int64)
    integers = np.empty(used, np.int64)
    for c in range(channels):
        row = levels[c]
        some = np.int64(0)
        for i in range(used):
            v = np.int64(row[i])
            some = max(some, abs(v))
            sixteenths[i] = 8 * v
        if some > LEVEL_PEAK:
            return False
        if with_mean:
            mean, factor = means[c], mean_factor[c]
            for i in range(used):
                m = np.int64(mean[i]) * (factor * mean_octave[i])
                sixteenths[i] += (m + (np.int64(1) << 30)) >> 31
        elif some == 0:
            continue
        scale, target = inverse_gain[c], y[c]
        for i in range(used):
            target[where[i]] = np.float32(sixteenths[i]) * scale * size[i]
        if with_context:
            factor = context_factor[c]
            for i in range(used):
                shift = context_shift[i]
                half = np.int64(1) << (shift - 1)
                k = (sixteenths[i] * (factor * context_octave[i]) + half) >> shift
                integers[i] = min(max(k, -127), 127)
            for i in range(used):
                p = places[where[i]]
                context[c, p] = np.uint8(integers[i] + 128)
                magnitudes[c, p] = np.uint8(abs(integers[i]) + base)
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

    y: (coded channels, positions) float32. gains: (positions,) uint8 effective gain indices.
    turn: of the colour planes. cells, index: the networks of the batch that it is one of.
    """

    shape: CellShape
    stages: int
    y: npt.NDArray[np.float32]
    gains: npt.NDArray[np.uint8]
    turn: Turn
    cells: Cells
    index: int


Classes = npt.NDArray[np.uint8]
Symbols = npt.NDArray[np.int32]
Levels = npt.NDArray[np.int32]
HyperSource = Callable[[Classes], Symbols]
"""Classes (z channels, rows, columns) to hyper-latent symbols of that shape."""
StageSource = Callable[[int, Classes, Array, Array], Levels]
"""(stage, classes, means, gains) to levels, arrays (channels, positions of the stage's lattice),
gains (positions,) of the whole grid."""

_NO_FACTOR = np.zeros(0, np.int64)


@dataclass(frozen=True, eq=False)
class CellJob:
    """A cell to code: its gain index, tilt and colours' turn, and where its symbols come from."""

    gain: int
    tilt: int
    turn: Turn
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
    positions, count = rows * columns, len(jobs)
    z = np.empty((count, a.z_channels, *shape.hyper), np.int32)
    for n, job in enumerate(jobs):
        z_classes = np.empty(z.shape[1:], np.uint8)
        z_classes[...] = model.z_classes[job.gain][:, None, None]
        z[n] = job.hyper_source(z_classes)
    if np.abs(z).max() > Z_PEAK:
        raise FormatError("a hyper-latent is beyond its range")
    cells = model.cells(count, rows, columns)
    gains = cells.hyper(z, [job.gain for job in jobs])
    y = np.zeros((count, a.channels_of(stages), positions), np.float32)
    ports = [cells.port(n) for n in range(count)]
    for k, stage in enumerate(a.stages[:stages]):
        where = lattice_positions(stage.lattice, rows, columns)
        channels = stage.channels
        seen = channels if stage.first < a.context_channels else slice(0)
        for n, (given, means) in enumerate(cells.stage(k)):
            factors, classes = model.factors[jobs[n].tilt], given
            if not factors.plain:
                classes = given.copy()
                _shift_classes(classes, factors.shift[channels])
            levels = jobs[n].stage_source(k, classes, means, gains[n])
            port = ports[n]
            fine = _dequantise(
                levels, means, where, gains[n], OCTAVE_TABLE,
                factors.mean[channels] if k < a.mean_stages else _NO_FACTOR,
                factors.context[channels], factors.inverse_gain[channels], STEPS,
                y[n, channels], port.values[seen], port.magnitudes[seen], port.places, port.base,
            )  # fmt: skip
            if not fine:
                raise FormatError("a symbol is beyond the format's range")
    return [
        CellLatents(shape, stages, y[n], gains[n], job.turn, cells, n) for n, job in enumerate(jobs)
    ]


@compiled
def _read_stages(
    arena, wide, plan_stages, operations, segments, positions, weights, biases, scales,
    layout, lattices, gains, octave, mean_factor, context_factor, inverse_gain, shift, steps,
    y, places, context_at, context_stride, magnitude_at, magnitude_stride,
    words, cursor, states, first, entries, offsets, radii, class_table, class_raw, packed,
):  # fmt: skip
    """All stages of a cell, from the stream to latents ``y`` and contexts. Returns a status.

    layout: (stages, 5) first channel, channels, whether there are means, channels of context, and
    where the stage's lattice ends in ``lattices``; one more row in front for where it begins.
    shift: of classes, of no channels where the tile is not tilted.
    """
    stages = layout.shape[0] - 1
    size = arena.shape[0]
    context = arena[context_at : size - (size - context_at) % context_stride]
    context = context.reshape(-1, context_stride).T
    magnitudes = arena[magnitude_at : size - (size - magnitude_at) % magnitude_stride]
    magnitudes = magnitudes.reshape(-1, magnitude_stride).T
    none = np.empty((0, 0), np.int16)
    for k in range(stages):
        begin, count = layout[k + 1, 0], layout[k + 1, 1]
        end, seen = begin + count, layout[k + 1, 3]
        where = lattices[layout[k, 4] : layout[k + 1, 4]]
        classes = np.empty((count, len(where)), np.uint8)
        means = np.empty((count, len(where)), np.int16) if layout[k + 1, 2] else none
        run_stage(
            arena, wide, plan_stages[k], operations, segments, positions, weights, biases, scales,
            classes, means,
        )  # fmt: skip
        if len(shift) > 0:
            _shift_classes(classes, shift[begin:end])
        levels = np.empty(classes.shape, np.int32)
        status = decode_symbols(
            classes.reshape(-1), levels.reshape(-1), words, cursor, states, first, entries, offsets,
            radii, class_table, class_raw, packed,
        )  # fmt: skip
        if status != 0:
            return status
        fine = _dequantise(
            levels, means, where, gains, octave, mean_factor[begin:end], context_factor[begin:end],
            inverse_gain[begin:end], steps, y[begin:end], context[begin : begin + seen],
            magnitudes[begin : begin + seen], places, 0,
        )  # fmt: skip
        if not fine:
            return BAD_ESCAPE
    return 0


def read_cells(
    model: DecoderModel,
    streams: Sequence[Decoder],
    gains: Sequence[int],
    tilts: Sequence[int],
    turns: Sequence[Turn],
    stages: int,
    shape: CellShape,
) -> list[CellLatents]:
    """Cells of one shape from their streams, networks in one call for all."""

    def classes_alone(stream: Decoder) -> StageSource:
        return lambda _k, classes, _means, _gains: stream.get(classes, dependent=True)

    jobs = [
        CellJob(gain, tilt, turn, stream.get, classes_alone(stream))
        for gain, tilt, turn, stream in zip(gains, tilts, turns, streams, strict=True)
    ]
    return code_cells(model, jobs, stages, shape)


@compiled
def _decode_cell(
    arena, wide, tables, plan_stages, layout, lattices, hyper, z_classes, gain, pitch, places,
    ports, factors, octave, steps, contexts, stream, packed, chain, columns, brush, colours, out,
):  # fmt: skip
    """A cell from its stream to its pixels ``out`` (height, width * 3). Returns a status.

    hyper, chain: where their operations begin and end; chain also where its output lies, and its
    stride, and its channels. contexts: offsets and strides of context and magnitudes. The rest as
    the functions take it that this calls.
    """
    operations, segments, positions, weights, biases, scales = tables
    words, cursor, states, first, entries, offsets, radii, class_table, class_raw = stream
    mean_factor, context_factor, inverse_gain, shift = factors
    z = np.empty(z_classes.shape, np.int32)
    flat = z.reshape(-1)
    status = decode_symbols(
        z_classes.reshape(-1), flat, words, cursor, states, first, entries, offsets, radii,
        class_table, class_raw, np.uint64(0),
    )  # fmt: skip
    if status != 0:
        return status
    for i in range(len(flat)):
        if flat[i] > Z_PEAK or flat[i] < -Z_PEAK:
            return BAD_HYPER
    gains = np.empty(len(places), np.uint8)
    run_hyper(
        arena, wide, hyper[0], hyper[1], operations, segments, positions, weights, biases, scales,
        z, gain, pitch, places, ports, gains,
    )  # fmt: skip
    channels = np.int64(0)
    for k in range(1, layout.shape[0]):
        channels = max(channels, layout[k, 0] + layout[k, 1])
    y = np.zeros((channels, len(places)), np.float32)
    status = _read_stages(
        arena, wide, plan_stages, operations, segments, positions, weights, biases, scales,
        layout, lattices, gains, octave, mean_factor, context_factor, inverse_gain, shift, steps,
        y, places, contexts[0], contexts[1], contexts[2], contexts[3],
        words, cursor, states, first, entries, offsets, radii, class_table, class_raw, packed,
    )  # fmt: skip
    if status != 0:
        return status
    run_program(
        arena, chain[0], chain[1], operations, segments, positions, weights, biases, scales
    )  # fmt: skip
    correction = arena[chain[2] : chain[2] + len(places) * chain[3]].reshape(len(places), chain[3])
    matrix, mean, angles = colours
    mixed = mixed_colours(matrix, mean, angles[0], angles[1], angles[2])
    paint(y, correction, chain[4], gains, steps, columns, brush, mixed, out)
    return 0


def decode_cell(
    model: DecoderModel,
    stream: Decoder,
    gain: int,
    tilt: int,
    turn: Turn,
    stages: int,
    shape: CellShape,
    out: Image,
) -> None:
    """A cell from its stream into ``out``, in one compiled call, on machines that run networks so.

    Threads meet at the interpreter once per tile, not several times per stage.
    """
    assert model.fused is not None
    a = model.architecture
    if stages > len(a.stages):
        raise FormatError(f"tile has {stages} stages, its model {len(a.stages)}")
    rows, columns = shape.latents
    z_classes = np.empty((a.z_channels, *shape.hyper), np.uint8)
    z_classes[...] = model.z_classes[gain][:, None, None]
    layout, lattices = _layout(a, rows, columns)
    plan, factors = model.fused.plan(rows, columns), model.factors[tilt]
    slots, hyper, chain = plan.slots, plan.programs["hyper"], plan.programs["chain"]
    arena = plan.arena()
    # cells within a larger tile are not contiguous
    whole = out.flags.c_contiguous
    target = out if whole else np.empty(out.shape, np.uint8)
    status = _decode_cell(
        arena, arena.view(np.int16), plan.tables, plan.stages, layout[: stages + 1], lattices,
        (hyper.begin, hyper.end), z_classes, gain, plan.pitch, plan.inside, plan.ports,
        (factors.mean, factors.context, factors.inverse_gain,
         _NO_FACTOR if factors.plain else factors.shift), OCTAVE_TABLE, STEPS,
        (slots["context"].offset, slots["context"].stride,
         slots["magnitude"].offset, slots["magnitude"].stride),
        stream.arguments(), np.uint64(PACKED),
        (chain.begin, chain.end, *chain.places["correction"]), columns,
        brush_of(model).arguments(), (model.colours, model.mean, turn),
        target.reshape(len(target), -1),
    )  # fmt: skip
    plan.give_back(arena)
    if status == BAD_HYPER:
        raise FormatError("a hyper-latent is beyond its range")
    check_status(status)
    if not whole:
        out[...] = target


@functools.lru_cache(maxsize=16)
def _layout(a: Architecture, rows: int, columns: int) -> tuple[Array, Array]:
    """What ``_read_stages`` needs to know of the stages, and their lattices' positions."""
    table, positions = [(0, 0, 0, 0, 0)], []
    end = 0
    for k, stage in enumerate(a.stages):
        positions.append(lattice_positions(stage.lattice, rows, columns))
        end += len(positions[-1])
        seen = stage.count if stage.first < a.context_channels else 0
        table.append((stage.first, stage.count, int(k < a.mean_stages), seen, end))
    return np.array(table, np.int64), np.concatenate(positions)


def quantise_stage(
    model: DecoderModel,
    factors: Factors,
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
        factors.mean[channels] if stage < a.mean_stages else _NO_FACTOR,
        factors.inverse_gain[channels], STEPS, residuals,
    )  # fmt: skip
    return search_levels(residuals, classes, lagrange, model.tables, lanes)


@compiled
def _saved(y, where, levels, inverse_gain, gains, steps, worth):
    total = np.float64(0)
    for c in range(levels.shape[0]):
        row = np.float64(0)
        for i in range(levels.shape[1]):
            if levels[c, i] != 0:
                p = where[i]
                found = np.float64(levels[c, i]) * 0.5
                value = y[c, p] / (inverse_gain[c] * steps[gains[p]])
                row += found * (2 * value - found)
        total += row * worth[c]
    return total


def errors_saved(
    factors: Factors,
    y: npt.NDArray[np.float32],
    where: npt.NDArray[np.int32],
    levels: Levels,
    gains: Array,
    channels: slice,
    worth: npt.NDArray[np.float32],
) -> float:
    """Bits that the errors which a stage's levels take away are worth: latents ``y`` (channels,
    positions) against zeros. worth: (channels,) of a squared error of one step."""
    inverse_gain = factors.inverse_gain[channels]
    return float(_saved(y, where, levels, inverse_gain, gains, STEPS, worth))


def synthesise(model: DecoderModel, cells: Sequence[CellLatents], outs: Sequence[Image]) -> None:
    """Pixels of cells of one shape into ``outs``, (height, width, 3) each."""
    corrections = cells[0].cells.corrections()
    brush, contexts = brush_of(model).arguments(), model.architecture.context_channels
    for cell, out in zip(cells, outs, strict=True):
        # cells within a larger tile are not contiguous
        whole = out.flags.c_contiguous
        target = out if whole else np.empty((cell.shape.height, cell.shape.width, 3), np.uint8)
        paint(
            cell.y, corrections[cell.index], contexts, cell.gains, STEPS, cell.shape.latents[1],
            brush, colours_of(model, cell.turn), target.reshape(len(target), -1),
        )  # fmt: skip
        if not whole:
            out[...] = target


def cells_of(height: int, width: int) -> list[tuple[int, int, CellShape]]:
    """(top, left, shape) of a tile's cells in coding order: rows of 512-pixel cells."""
    return [
        (top, left, CellShape(min(CELL, height - top), min(CELL, width - left)))
        for top in range(0, height, CELL)
        for left in range(0, width, CELL)
    ]
