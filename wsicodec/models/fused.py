"""Runs a model's networks as one compiled program, where the machine has the instructions.

onnxruntime runs every layer by itself, on its own copies; on tiles that costs as much as the
arithmetic. Here all networks of a cell share one block of memory (``Arena``), channels last, with a
frame of zeros around the grid, and a network is a list of convolutions over it: a Concat is two
segments to sum, a DepthToSpace four sets of target positions, a lattice a list of positions
(wsicodec.models.vnni has the inner loop). What comes out is the same integer as from the graphs,
which the first use compares (``wsicodec.models.networks``).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from wsicodec.entropy.compiled import compiled
from wsicodec.models.lattice import lattice_positions
from wsicodec.models.layers import (
    CHAIN_INPUTS,
    HYPER_INPUTS,
    STAGE_INPUTS,
    Layer,
    Network,
    NotFusible,
    Part,
    parse_graph,
)
from wsicodec.models.vnni import DOT_INT16, DOT_UINT8, POSITIONS, VECTORS, WIDTH

Array = npt.NDArray[Any]

Tables = tuple[Array, Array, Array, Array, Array, Array]
"""Operations, segments, positions, weights, biases, scales."""

GROUP = 4  # channels of one dot product
MAX_SEGMENTS = 64
MAX_IDLE = 4


def _padded(count: int, unit: int) -> int:
    return -(-count // unit) * unit


def _panel(weight: Array, parts: Sequence[Part]) -> Array:
    """Weights (rows, channels, k, k) in the order in which the inner loop reads them."""
    pieces = []
    first = 0
    for part in parts:
        given = weight[:, first : first + part.channels]
        groups = _padded(part.channels, GROUP) // GROUP
        w = np.zeros((len(weight), GROUP * groups, *weight.shape[2:]), np.int8)
        w[:, : part.channels] = given
        taps = w.reshape(len(weight), groups, GROUP, -1).transpose(3, 1, 0, 2)
        pieces.append(taps.reshape(-1))
        first += part.channels
    return np.concatenate(pieces)


@dataclass(frozen=True)
class Block:
    """Outputs ``first`` ... ``first + 16 * vectors - 1`` of a layer: what one operation computes.

    weights, rows: where its weights begin, and its biases and scales, in ``Weights``.
    """

    first: int
    vectors: int
    weights: int
    rows: int


@dataclass(frozen=True, eq=False)
class Weights:
    """All weights of a model as the inner loop reads them, whatever the shape of the cell.

    blocks: of each layer's phases, by the layer's buffer and the phase.
    """

    blocks: Mapping[tuple[str, int], tuple[Block, ...]]
    panels: Array
    biases: Array
    scales: Array

    @classmethod
    def of(cls, layers: Iterable[Layer]) -> Weights:
        """Raises NotFusible for a layer that reads from too many places."""
        blocks: dict[tuple[str, int], tuple[Block, ...]] = {}
        panels: list[Array] = []
        biases: list[Array] = []
        scales: list[Array] = []
        weighed = rowed = 0
        for layer in layers:
            segments = len(layer.parts) * layer.weight.shape[-1] ** 2
            if segments > MAX_SEGMENTS:
                raise NotFusible(f"{layer.buffer}: {segments} segments")
            for phase in range(layer.phase_count):
                pick = slice(phase, None, layer.phase_count)
                weight, bias, scale = layer.weight[pick], layer.bias[pick], layer.scale[pick]
                count = _padded(len(weight), WIDTH)
                extra = count - len(weight)
                padding = np.zeros((extra, *weight.shape[1:]), weight.dtype)
                weight = np.concatenate([weight, padding])
                biases.append(np.pad(bias, (0, extra)))
                scales.append(np.pad(scale, (0, extra), constant_values=1))
                found = []
                for first in range(0, count, WIDTH * VECTORS):
                    vectors = min(VECTORS, (count - first) // WIDTH)
                    panels.append(_panel(weight[first : first + WIDTH * vectors], layer.parts))
                    found.append(Block(first, vectors, weighed, rowed + first))
                    weighed += panels[-1].size
                blocks[layer.buffer, phase] = tuple(found)
                rowed += count
        return cls(
            blocks, np.concatenate(panels), np.concatenate(biases).astype(np.int32),
            np.concatenate(scales).astype(np.float32),
        )  # fmt: skip


@dataclass(frozen=True)
class Slot:
    """A buffer's place in the arena: bytes of offset, stride from one position to the next, and
    what it is filled with at first. grid: on the cell's framed grid, else on a list of positions
    (outputs that only the caller reads)."""

    offset: int
    stride: int
    fill: int
    size: int


@dataclass(frozen=True, eq=False)
class Program:
    """A network for one shape of cell.

    begin, end: its operations in the plan's tables. places: (offset, stride, channels) of each
    output, in bytes, by name. count: positions of its outputs.
    """

    begin: int
    end: int
    places: Mapping[str, tuple[int, int, int]]
    count: int


@dataclass(frozen=True, eq=False)
class Plan:
    """All networks of a model for cells of one shape.

    pitch: columns of the framed grid. slots: by buffer. inside: place of each position.
    programs: hyper, stages, chain. tables: their operations and all that these refer to. stages:
    (stages, 6) place and stride of the classes, of the means, and where the stage's operations
    begin and end, for ``run_stage``. ports: (5, 2) offset and stride of z, constant plane, step,
    plane and the chain's plane. idle: arenas that wait for the next cell.
    """

    rows: int
    columns: int
    pitch: int
    slots: Mapping[str, Slot]
    inside: Array
    programs: Mapping[str, Program]
    tables: Tables
    stages: Array
    ports: Array
    template: Array
    idle: list[Array]

    def arena(self) -> Array:
        """Memory for one cell: a used one with contexts cleared, or a new one."""
        try:
            arena = self.idle.pop()
        except IndexError:
            return self.template.copy()
        for name in ("context", "magnitude"):
            slot = self.slots[name]
            arena[slot.offset : slot.offset + slot.size] = slot.fill
        return arena

    def give_back(self, arena: Array) -> None:
        if len(self.idle) < MAX_IDLE:
            self.idle.append(arena)


class FusedModel:
    """The networks of a model as programs. Immutable but for its cache of plans."""

    def __init__(
        self,
        graphs: Mapping[str, bytes],
        lattices: Sequence[int],
        contexts: int,
        z_channels: int,
        hyper: int,
    ) -> None:
        """graphs: ``hyper``, ``stage0`` ..., ``chain``. Raises NotFusible."""
        self.inputs = {
            "z": z_channels, "constant": 1, "h": hyper, "plane": 1,
            "context": contexts, "magnitude": contexts, "chain_plane": 1,
        }  # fmt: skip
        self.lattices = tuple(lattices)
        self.networks = {"hyper": parse_graph(graphs["hyper"], "hyper", HYPER_INPUTS)}
        for k in range(len(lattices)):
            self.networks[f"stage{k}"] = parse_graph(graphs[f"stage{k}"], f"stage{k}", STAGE_INPUTS)
        self.networks["chain"] = parse_graph(graphs["chain"], "chain", CHAIN_INPUTS)
        wanted = {"hyper": {"h", "step"}, "chain": {"correction"}}
        for name, network in self.networks.items():
            outputs = set(network.outputs)
            if outputs != wanted.get(name, outputs) or "context" in outputs:
                raise NotFusible(f"{name}: outputs")
            for layer in network.layers:
                # beyond the last row and column, h and plane are not those of a smaller grid
                seen = {p.buffer for p in layer.parts}
                if name != "hyper" and layer.reaches and seen & {"h", "plane", "chain_plane"}:
                    raise NotFusible(f"{name}: a wide layer reads {seen}")
        self.weights = Weights.of(x for n in self.networks.values() for x in n.layers)
        self.plan = functools.lru_cache(maxsize=16)(self._plan)

    def _plan(self, rows: int, columns: int) -> Plan:
        z_rows, z_columns = -(-rows // 2), -(-columns // 2)
        pitch = 2 * z_columns + 2
        framed = (2 * z_rows + 2) * pitch
        slots: dict[str, Slot] = {}
        end = 0

        def place(name: str, stride: int, positions: int, fill: int) -> None:
            nonlocal end
            slots[name] = Slot(end, stride, fill, stride * positions)
            end = _padded(end + stride * positions, 64)

        zeros = HYPER_INPUTS | STAGE_INPUTS | CHAIN_INPUTS
        for name, channels in self.inputs.items():
            # whole vectors are stored: h is the one input that a network writes
            place(name, _padded(channels, WIDTH if name == "h" else GROUP), framed, zeros[name])
        grid = np.arange(framed).reshape(-1, pitch)
        inside = np.ascontiguousarray(grid[1 : 1 + rows, 1 : 1 + columns].reshape(-1))
        doubled = grid[1 : 1 + 2 * z_rows, 1 : 1 + 2 * z_columns]
        # hyper-latents lie on every other position of the doubled grid's frame of reference
        z_where = grid[1 : 1 + z_rows, 1 : 1 + z_columns].reshape(-1)
        phase = [doubled[y::2, x::2].reshape(-1) for y in (0, 1) for x in (0, 1)]
        programs = {}
        writer = _Writer(slots, pitch, self.weights)
        for name, network in self.networks.items():
            lattice = self.lattices[int(name[5:])] if name.startswith("stage") else 0
            chosen = inside[lattice_positions(lattice, rows, columns)]
            last = set(network.outputs.values())
            on_lattice = _behind_the_last_reach(network)
            for layer in network.layers:
                listed = layer.buffer in last and network.outputs.get("h") != layer.buffer
                stride = _padded(layer.outputs, WIDTH) * (2 if layer.wide else 1)
                if network.outputs.get("h") == layer.buffer:
                    slots[layer.buffer] = slots["h"]
                    continue
                # networks run one after the other: theirs are the same places, but only for
                # buffers of one shape, whose frames nobody writes (hyper's grid may be larger)
                order = [x.buffer for x in network.layers].index(layer.buffer)
                owner = "hyper" if name == "hyper" else "any"
                shared = f"{owner} {order}: {stride}, {layer.zero}, {listed}"
                if shared not in slots:
                    place(shared, stride, _padded(framed, POSITIONS), layer.zero)
                slots[layer.buffer] = slots[shared]
            begin = len(writer.operations)
            for layer in network.layers:
                listed = layer.buffer in last and network.outputs.get("h") != layer.buffer
                if name != "hyper":
                    read = chosen if layer.buffer in on_lattice else inside
                elif layer.phases:
                    read = z_where
                else:
                    read = inside if layer.buffer in last else doubled.reshape(-1)
                write = np.arange(len(read)) if listed else read
                for n in range(layer.phase_count):
                    writer.add(layer, n, read, phase[n] if layer.phases else write)
            by_buffer = {layer.buffer: layer for layer in network.layers}
            places = {
                port: (slots[b].offset, slots[b].stride, by_buffer[b].outputs)
                for port, b in network.outputs.items()
            }
            programs[name] = Program(begin, len(writer.operations), places, len(chosen))
        template = np.zeros(end, np.uint8)
        for slot in slots.values():
            if slot.fill:
                template[slot.offset : slot.offset + slot.size] = slot.fill
        template.flags.writeable = False
        stages = np.array(
            [
                (*p.places["class"][:2], *p.places.get("mean", (0, 0))[:2], p.begin, p.end)
                for p in (programs[f"stage{k}"] for k in range(len(self.lattices)))
            ],
            np.int64,
        )
        ports = [(slots[n].offset, slots[n].stride) for n in ("z", "constant")]
        ports.append(programs["hyper"].places["step"][:2])
        ports += [(slots[n].offset, slots[n].stride) for n in ("plane", "chain_plane")]
        tables = writer.tables()
        return Plan(
            rows, columns, pitch, slots, inside, programs, tables, stages,
            np.array(ports, np.int64), template, [],
        )  # fmt: skip


def _behind_the_last_reach(network: Network) -> set[str]:
    """Buffers that nothing reads beside the position itself: they are needed on the lattice."""
    needed_whole: set[str] = set()
    result = set()
    for layer in reversed(network.layers):
        whole = layer.buffer in needed_whole
        if not whole:
            result.add(layer.buffer)
        if whole or layer.reaches:
            needed_whole |= {p.buffer for p in layer.parts}
    return result


class _Writer:
    """Collects the operations of all networks of a plan."""

    def __init__(self, slots: Mapping[str, Slot], pitch: int, weights: Weights) -> None:
        self.slots, self.pitch, self.weights = slots, pitch, weights
        self.operations: list[list[int]] = []
        self.segments: list[tuple[int, int, int]] = []
        self.positions: list[Array] = []
        self.placed = 0

    def _listed(self, values: Array) -> int:
        """Where a list of positions begins; lists are filled up with their last one."""
        short = -len(values) % POSITIONS
        whole = np.concatenate([values, np.repeat(values[-1:], short)]).astype(np.int64)
        self.positions.append(whole)
        start, self.placed = self.placed, self.placed + len(whole)
        return start

    def add(self, layer: Layer, phase: int, read: Array, write: Array) -> None:
        """A layer, or one phase of it, from the positions ``read`` to the positions ``write``."""
        reads, writes = self._listed(read), self._listed(write)
        first = len(self.segments)
        half = layer.weight.shape[-1] // 2
        for part in layer.parts:
            slot = self.slots[part.buffer]
            groups = _padded(part.channels, GROUP) // GROUP
            for y in range(-half, half + 1):
                for x in range(-half, half + 1):
                    shift = y * self.pitch + x
                    at = slot.offset + shift * slot.stride
                    self.segments.append((at, slot.stride, groups))
        target = self.slots[layer.buffer]
        for block in self.weights.blocks[layer.buffer, phase]:
            self.operations.append([
                first, len(self.segments) - first, reads, len(self.positions[-1]),
                writes, target.offset + block.first * (2 if layer.wide else 1), target.stride,
                block.weights, block.rows, block.vectors,
                layer.low, layer.high, layer.zero, int(layer.wide),
            ])  # fmt: skip

    def tables(self) -> Tables:
        """What ``run_program`` takes."""
        weights = self.weights
        return (
            np.array(self.operations, np.int64), np.array(self.segments, np.int64),
            np.concatenate(self.positions), weights.panels, weights.biases, weights.scales,
        )  # fmt: skip


_U1, _U2, _U3, _U4 = DOT_UINT8
_W1, _W2, _W3, _W4 = DOT_INT16


@compiled
def run_program(
    arena, begin, end, operations, segments, positions, weights, biases, scales
):  # fmt: skip
    """Run operations ``begin`` ... ``end`` - 1 over the arena, one after the other."""
    base = arena.ctypes.data
    table = np.empty((MAX_SEGMENTS, 3), np.int64)
    targets = np.empty(4, np.int64)
    to, rows = targets.ctypes.data, table.ctypes.data
    # addresses once: views of arrays that threads share count their users, which takes turns
    all_weights, all_biases = weights.ctypes.data, biases.ctypes.data
    all_scales, all_positions = scales.ctypes.data, positions.ctypes.data
    for n in range(begin, end):
        first, count = operations[n, 0], operations[n, 1]
        for s in range(count):
            table[s, 0] = segments[first + s, 0] + base
            table[s, 1] = segments[first + s, 1]
            table[s, 2] = segments[first + s, 2]
        w = all_weights + operations[n, 7]
        b = all_biases + 4 * operations[n, 8]
        f = all_scales + 4 * operations[n, 8]
        vectors, low, high = operations[n, 9], operations[n, 10], operations[n, 11]
        zero, wide = operations[n, 12], operations[n, 13]
        where = all_positions + 8 * operations[n, 2]
        write, start, stride = operations[n, 4], operations[n, 5], operations[n, 6]
        for m in range(0, operations[n, 3], 4):
            for i in range(4):
                targets[i] = base + start + positions[write + m + i] * stride
            p = where + 8 * m
            if wide:
                if vectors == 4:
                    _W4(rows, count, p, to, w, b, f, low, high, zero)
                elif vectors == 3:
                    _W3(rows, count, p, to, w, b, f, low, high, zero)
                elif vectors == 2:
                    _W2(rows, count, p, to, w, b, f, low, high, zero)
                else:
                    _W1(rows, count, p, to, w, b, f, low, high, zero)
            elif vectors == 4:
                _U4(rows, count, p, to, w, b, f, low, high, zero)
            elif vectors == 3:
                _U3(rows, count, p, to, w, b, f, low, high, zero)
            elif vectors == 2:
                _U2(rows, count, p, to, w, b, f, low, high, zero)
            else:
                _U1(rows, count, p, to, w, b, f, low, high, zero)


@compiled
def run_stage(
    arena, wide, stage, operations, segments, positions, weights, biases, scales, classes, means
):  # fmt: skip
    """Run a stage's program and fetch its outputs, (channels, positions) each. wide: the arena as
    int16. stage: its row of the plan's ``stages``. means: of no channels where there are none."""
    class_at, class_stride, mean_at, mean_stride = stage[0], stage[1], stage[2], stage[3]
    run_program(
        arena, stage[4], stage[5], operations, segments, positions, weights, biases, scales
    )  # fmt: skip
    channels, count = classes.shape
    for i in range(count):
        at = class_at + i * class_stride
        for c in range(channels):
            classes[c, i] = arena[at + c]
    for i in range(means.shape[1]):
        at = (mean_at + i * mean_stride) >> 1
        for c in range(means.shape[0]):
            means[c, i] = wide[at + c]
