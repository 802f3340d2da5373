"""The networks of cells under way: what a stage needs goes in, classes and means come out.

Two forms with one face. ``GraphCells`` runs the model's graphs in onnxruntime, all cells of a batch
in one call. ``FusedCells`` runs the compiled programs of ``wsicodec.models.fused``, cell by cell,
on machines that have the instructions. Both give the same integers; ``fused_model`` compares them
before the second is used.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from wsicodec.entropy.compiled import compiled
from wsicodec.models.fused import FusedModel, run_program, run_stage
from wsicodec.models.layers import NotFusible
from wsicodec.models.session import GraphRunner, IntegerRunner, StageRunner
from wsicodec.models.vnni import available

Array = npt.NDArray[Any]
Bytes = npt.NDArray[np.uint8]

_NO_MEANS = np.zeros((0, 0), np.int16)


@dataclass(frozen=True, eq=False)
class ContextPort:
    """Where context integers go: ``values`` (channels, places), 128 added, and ``magnitudes``,
    ``base`` added; ``places`` (positions,) says which place is a position's."""

    values: Bytes
    magnitudes: Bytes
    places: npt.NDArray[np.int64]
    base: int


class Cells(Protocol):
    """Networks of ``count`` cells of one shape."""

    def hyper(self, z: Array, gains: Sequence[int]) -> Bytes:
        """Effective gain indices (count, positions) from hyper-latents (count, channels, rows,
        columns), whole numbers within +-127, and the cells' gain indices."""
        ...

    def stage(self, k: int) -> list[tuple[Bytes, Array]]:
        """Classes (channels, positions of the lattice) and means, int16 (none: no channels), of
        each cell."""
        ...

    def port(self, n: int) -> ContextPort:
        """Where the context of cell ``n`` goes."""
        ...

    def corrections(self) -> Sequence[Bytes]:
        """(positions, channels) of each cell: what the chain gives, 128 for zero."""
        ...


@dataclass(frozen=True, eq=False)
class GraphSet:
    """A model's graphs in onnxruntime, and the shapes that go with them.

    seen: channels of context before each stage. mean_stages: leading stages that have means.
    """

    hyper: IntegerRunner
    stages: Sequence[StageRunner]
    chain: GraphRunner
    seen: Sequence[int]
    mean_stages: int
    contexts: int


class GraphCells:
    """Cells whose networks run in onnxruntime."""

    def __init__(self, graphs: GraphSet, count: int, rows: int, columns: int) -> None:
        self._graphs, self._count, self._grid = graphs, count, (rows, columns)
        positions = rows * columns
        # context integers and their magnitudes, 128 more; below them the gain plane for the chain
        shape = (2, count, graphs.contexts + 1, positions)
        self._context = np.full(shape, 128, np.uint8)
        self._places = np.arange(positions)

    def hyper(self, z: Array, gains: Sequence[int]) -> Bytes:
        rows, columns = self._grid
        doubled = (2 * z.shape[2], 2 * z.shape[3])
        plane = np.empty((self._count, 1, *doubled), np.uint8)
        plane[...] = np.asarray(gains, np.uint8)[:, None, None, None]
        h, step = self._graphs.hyper({"z": z.astype(np.float32), "plane": plane})
        self._h = np.ascontiguousarray(h[:, :, :rows, :columns])
        delta = step[:, :, :rows, :columns].astype(np.int16)
        self.plane = np.clip(plane[:, :, :rows, :columns] + delta, 0, 255).astype(np.uint8)
        effective: Bytes = self.plane.reshape(self._count, -1)
        self._context[0, :, -1] = np.maximum(effective, 1)
        return effective

    def stage(self, k: int) -> list[tuple[Bytes, Array]]:
        inputs = {"h": self._h, "plane": self.plane}
        if k:
            grid = self._context.reshape(2, self._count, -1, *self._grid)
            inputs["context"], inputs["magnitude"] = grid[:, :, : self._graphs.seen[k]]
        outputs = self._graphs.stages[k](inputs)
        with_means = k < self._graphs.mean_stages
        return [
            (outputs[0][n], outputs[1][n] if with_means else _NO_MEANS) for n in range(self._count)
        ]

    def port(self, n: int) -> ContextPort:
        return ContextPort(self._context[0, n], self._context[1, n], self._places, 128)

    def corrections(self) -> Sequence[Bytes]:
        grid = self._context[0].reshape(self._count, -1, *self._grid)
        correction = np.ascontiguousarray(self._graphs.chain({"context": grid})[0], np.uint8)
        return list(correction.reshape(self._count, self._grid[0] * self._grid[1], -1))


@compiled
def run_hyper(
    arena, wide, begin, end, operations, segments, positions, weights, biases, scales,
    z, gain, pitch, inside, ports, gains,
):  # fmt: skip
    """Hyper-latents z (channels, rows, columns) and a gain index into the arena, the network, and
    effective gain indices out of it and into the arena. wide: the arena as int16.

    ports: offset and stride, in bytes, of z, constant plane, step, plane and the chain's plane.
    """
    channels, rows, columns = z.shape
    for i in range(rows):
        for j in range(columns):
            at = ports[0, 0] + ((i + 1) * pitch + j + 1) * ports[0, 1]
            for c in range(channels):
                arena[at + c] = np.uint8(np.int64(z[c, i, j]) + 128)
    for i in range(2 * rows):
        for j in range(2 * columns):
            arena[ports[1, 0] + ((i + 1) * pitch + j + 1) * ports[1, 1]] = np.uint8(gain)
    run_program(
        arena, begin, end, operations, segments, positions, weights, biases, scales
    )  # fmt: skip
    for i in range(inside.shape[0]):
        p = inside[i]
        e = np.int64(gain) + np.int64(wide[(ports[2, 0] + p * ports[2, 1]) >> 1])
        e = min(max(e, np.int64(0)), np.int64(255))
        gains[i] = np.uint8(e)
        arena[ports[3, 0] + p * ports[3, 1]] = np.uint8(e)
        arena[ports[4, 0] + p * ports[4, 1]] = np.uint8(max(e, np.int64(1)))


class FusedCells:
    """Cells whose networks run as compiled programs, each in an arena of its own."""

    def __init__(self, model: FusedModel, count: int, rows: int, columns: int) -> None:
        self._contexts = model.inputs["context"]
        plan = self.plan = model.plan(rows, columns)
        self.arenas = [plan.arena() for _ in range(count)]
        for arena in self.arenas:
            weakref.finalize(self, plan.give_back, arena).atexit = False

    def hyper(self, z: Array, gains: Sequence[int]) -> Bytes:
        plan = self.plan
        program = plan.programs["hyper"]
        effective = np.empty((len(self.arenas), len(plan.inside)), np.uint8)
        for n, (arena, gain) in enumerate(zip(self.arenas, gains, strict=True)):
            run_hyper(
                arena, arena.view(np.int16), program.begin, program.end, *plan.tables,
                np.ascontiguousarray(z[n], np.int32), gain, plan.pitch, plan.inside, plan.ports,
                effective[n],
            )  # fmt: skip
        return effective

    def stage(self, k: int) -> list[tuple[Bytes, Array]]:
        plan, found = self.plan, []
        program = plan.programs[f"stage{k}"]
        channels = program.places["class"][2]
        with_means = "mean" in program.places
        for arena in self.arenas:
            classes = np.empty((channels, program.count), np.uint8)
            means = np.empty(classes.shape, np.int16) if with_means else _NO_MEANS
            row = plan.stages[k]
            run_stage(arena, arena.view(np.int16), row, *plan.tables, classes, means)
            found.append((classes, means))
        return found

    def _view(self, n: int, offset: int, stride: int, rows: int, channels: int) -> Bytes:
        """Channels of a buffer of cell ``n``, (rows, channels)."""
        view: Bytes = self.arenas[n][offset : offset + rows * stride]
        return view.reshape(rows, stride)[:, :channels]

    def port(self, n: int) -> ContextPort:
        slots = (self.plan.slots[name] for name in ("context", "magnitude"))
        values, magnitudes = (
            self._view(n, s.offset, s.stride, s.size // s.stride, self._contexts).T for s in slots
        )
        return ContextPort(values, magnitudes, self.plan.inside, 0)

    def corrections(self) -> Sequence[Bytes]:
        program = self.plan.programs["chain"]
        at, stride, channels = program.places["correction"]
        for arena in self.arenas:
            run_program(arena, program.begin, program.end, *self.plan.tables)
        count = len(self.arenas)
        return [self._view(n, at, stride, program.count, channels) for n in range(count)]


def fused_model(
    graphs: Mapping[str, bytes],
    lattices: Sequence[int],
    contexts: int,
    z_channels: int,
    hyper: int,
    plain: GraphSet,
) -> FusedModel | None:
    """The model's programs, compared with its graphs; None where they cannot run or differ."""
    if not available():
        return None
    try:
        model = FusedModel(graphs, lattices, contexts, z_channels, hyper)
    except NotFusible:
        return None
    rng = np.random.default_rng(0)
    for rows, columns, extreme in ((3, 5, False), (4, 4, True)):
        cells = GraphCells(plain, 1, rows, columns), FusedCells(model, 1, rows, columns)
        z_shape = (1, z_channels, -(-rows // 2), -(-columns // 2))
        z = rng.integers(-127, 128, z_shape)
        z = np.where(z > 0, 127, z) if extreme else z
        first, second = (c.hyper(z, [90]) for c in cells)
        same = np.array_equal(first, second)
        for k in range(len(lattices)):
            context = rng.integers(-127, 128, (contexts, rows * columns))
            context = np.where(context > 0, 127, context) if extreme else context
            if k:
                for c in cells:
                    port = c.port(0)
                    port.values[:contexts, port.places] = context + 128
                    port.magnitudes[:contexts, port.places] = np.abs(context) + port.base
            for a, b in zip(*(c.stage(k)[0] for c in cells), strict=True):
                same &= np.array_equal(a, b)
        same &= np.array_equal(cells[0].corrections()[0], cells[1].corrections()[0])
        if not same:
            return None
    return model
