"""Learned tiles decoded batch by batch on a backend, from their bytes to uint8 pixels.

All tiles of a batch share a model, a size, a number of stages and of lanes, and go through each
step together:

    hyper-latents -> hyper graph -> for each stage: stage graph -> classes -> rANS -> dequantiser
    -> correction chain -> synthesis graph

with nothing on the host in between, cell by cell where tiles have several. Symbols are those of the
CPU decoder, since the graphs that choose their classes are exact; pixels stay within the format's
tolerance of its.
"""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from wsicodec.bitstream import Tile
from wsicodec.codec.cell import CellShape, cells_of
from wsicodec.codec.colours import PLAIN, Turn
from wsicodec.codec.cosine import SAMPLES
from wsicodec.codec.network import TURN_BYTES, _read_turns
from wsicodec.codec.pixels import colours_of
from wsicodec.errors import (
    FormatError,
    SettingsError,
    UnknownModelError,
    UnsupportedError,
    WsicodecError,
)
from wsicodec.models.decoder import DecoderModel
from wsicodec.models.lattice import lattice_positions
from wsicodec.pipelines.backend import Array, Backend, Network, Run, Streams
from wsicodec.pipelines.graphs import chain_graph, hyper_graph, mosaic_graph, stage_graph
from wsicodec.pipelines.images import Images
from wsicodec.pipelines.synthesis import Synthesis

STEPS_OF_A_BATCH = ("upload", "rans", "networks", "dequantise", "synthesis")
"""What the time of a batch is told by."""
PLANS = 4
"""Plans, of kinds and counts of tiles, whose buffers a decoder keeps."""
SESSIONS = 32
"""Synthesis graphs, of shapes and numbers of channels, that a decoder keeps."""

Trace = Callable[[int, int, npt.NDArray[np.int32]], None]
"""Called with (cell, stage, symbols (N, channels, places)) in coding order; stage -1 holds the
hyper-latents. Those of tiles at fault mean nothing."""


@dataclass(frozen=True)
class BatchSettings:
    """memory: bytes that one decoder may take on its backend, beside the pixels that it gives
        away; None: what the backend allows.
    tiles: the most in a batch. half: paint in float16 where the format's tolerance allows it.
    flights: batches under way at a time, each with buffers of its own.
    """

    memory: int | None = None
    tiles: int = 1024
    half: bool = False
    flights: int = 2

    def __post_init__(self) -> None:
        if self.tiles < 1 or self.flights < 1 or (self.memory is not None and self.memory < 1):
            raise SettingsError("a batch needs memory, a tile and a flight at least")


@dataclass(frozen=True)
class Kind:
    """What tiles of a batch have in common beside their model."""

    height: int
    width: int
    stages: int
    lanes_log2: int

    @classmethod
    def of(cls, tile: Tile) -> Kind:
        assert tile.learned is not None
        return cls(tile.height, tile.width, tile.learned.stages, tile.learned.lanes_log2)

    @property
    def cells(self) -> list[tuple[int, int, CellShape]]:
        return cells_of(self.height, self.width)


@dataclass(frozen=True)
class Decoded:
    """A batch. images: pixels of all tiles; those of tiles at fault mean nothing. errors: what is
    wrong with each tile, None for nothing."""

    images: Images
    errors: list[WsicodecError | None]

    def checked(self) -> Images:
        """The pixels, or the first error."""
        for error in self.errors:
            if error is not None:
                raise error
        return self.images


# -- memory --


def _shapes(model: DecoderModel, kind: Kind, count: int) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Shapes and types of the buffers of ``count`` tiles' largest cell."""
    a, shape = model.architecture, kind.cells[0][2]
    (rows, columns), (z_rows, z_columns) = shape.latents, shape.hyper
    positions, contexts = rows * columns, a.context_channels
    most = max(
        s.count * len(lattice_positions(s.lattice, rows, columns)) for s in a.stages[: kind.stages]
    )
    z = (count, a.z_channels, z_rows, z_columns)
    return {
        "z_classes": (z, np.uint8),
        "symbols": (z, np.int32),
        "z": (z, np.float32),
        "gain": ((count, 1, 1, 1), np.float32),
        "indices": ((count,), np.uint8),
        "tilts": ((count,), np.uint8),
        "features": ((count, a.hyper, rows, columns), np.float32),
        "step": ((count, 1, 2 * z_rows, 2 * z_columns), np.int8),
        "gains": ((count, rows, columns), np.uint8),
        "plane": ((count, 1, rows, columns), np.float32),
        "chain": ((count, contexts + 1, rows, columns), np.uint8),
        "real": ((count, contexts, rows, columns), np.float32),
        "correction": ((count, contexts, rows, columns), np.uint8),
        "classes": ((count * most,), np.uint8),
        "means": ((count * most,), np.int16),
        "levels": ((count * most,), np.int32),
        "y": ((count, a.channels_of(kind.stages), positions), np.float32),
        "colours": ((count, 3, 3), np.float32),
        "offset": ((count, 3, 1), np.float32),
        "peak": ((count,), np.float32),
    }


def bytes_of_tile(model: DecoderModel, kind: Kind, flights: int) -> int:
    """Bytes that a tile of a batch takes: its buffers, once per flight, and what the networks and
    the synthesis hold between their layers. Its stream, the workspaces of the provider's kernels
    and the pixels that the caller gets come on top."""
    shapes = _shapes(model, kind, 1)
    buffers: int = sum(int(np.prod(s)) * np.dtype(dtype).itemsize for s, dtype in shapes.values())
    buffers += 4 * int(np.prod(shapes["levels"][0]))  # places of coded symbols
    pixels = 3 * kind.height * kind.width
    buffers += 2 * pixels if len(kind.cells) > 1 else pixels
    # per position: the widest layers of all networks, in and out, since each session keeps what it
    # took; the blocks, thrice in float32 and once in bytes
    widest: int = _widest(model)
    between = 4 * (3 * SAMPLES + 4 * widest) + SAMPLES
    rows, columns = kind.cells[0][2].latents
    return flights * buffers + between * rows * columns


@functools.lru_cache(maxsize=4)
def _widest(model: DecoderModel) -> int:
    """Channels of the networks' layers: of each graph its widest, added up."""
    import onnx

    total = 0
    names = ("hyper", "chain", *(f"stage{k}" for k in range(len(model.architecture.stages))))
    for name in names:
        graph = onnx.load_model_from_string(model.graph_bytes(name)).graph
        # weights are (out, in, kernel, kernel)
        total += max(int(max(t.dims[:2])) for t in graph.initializer if len(t.dims) == 4)
    return total


# -- plans --


class _Flight:
    """Buffers of one batch, and its calls bound to them."""

    def __init__(self, decoder: BatchDecoder, kind: Kind, count: int) -> None:
        backend, self._decoder = decoder.backend, decoder
        self.kind, self.count = kind, count
        self._flat = {
            name: backend.empty((int(np.prod(shape)),), dtype)
            for name, (shape, dtype) in _shapes(decoder.model, kind, count).items()
        }
        self.pixels = backend.empty((count, kind.height, kind.width, 3), np.uint8)
        self.cells = [self._cell(shape) for _, _, shape in kind.cells]
        self.mosaic: Run | None = None
        if len(self.cells) > 1:
            lines = -(-kind.height // kind.cells[0][2].height)
            network = decoder.mosaic(lines, len(self.cells) // lines)
            parts = {f"cell{n}": cell.pixels for n, cell in enumerate(self.cells)}
            self.mosaic = decoder.bind(network, parts, {"pixels": self.pixels})
        self.pending: Pending | None = None

    def view(self, name: str, *shape: int) -> Array:
        """The beginning of a buffer."""
        return self._flat[name][: int(np.prod(shape))].reshape(shape)

    def _cell(self, shape: CellShape) -> _Cell:
        return _Cell(self, self._decoder, shape)


class _Cell:
    """Cells of one place in the tiles of a batch: views of the buffers, and the calls."""

    def __init__(self, flight: _Flight, decoder: BatchDecoder, shape: CellShape) -> None:
        n, model, kind = flight.count, decoder.model, flight.kind
        a = model.architecture
        (rows, columns), (z_rows, z_columns) = shape.latents, shape.hyper
        positions, contexts, channels = (
            rows * columns,
            a.context_channels,
            a.channels_of(kind.stages),
        )
        self.shape, view = shape, flight.view
        self.z_classes = view("z_classes", n, a.z_channels, z_rows, z_columns)
        self.symbols = view("symbols", n, a.z_channels, z_rows, z_columns)
        self.z = view("z", n, a.z_channels, z_rows, z_columns)
        self.step = view("step", n, 1, 2 * z_rows, 2 * z_columns)
        self.gains = view("gains", n, rows, columns)
        self.plane = view("plane", n, 1, rows, columns)
        self.chain = view("chain", n, contexts + 1, rows, columns)
        self.real = view("real", n, contexts, rows, columns)
        self.y = view("y", n, channels, positions)
        self.colours, self.offset = view("colours", n, 3, 3), view("offset", n, 3, 1)
        self.indices, self.tilts = view("indices", n), view("tilts", n)
        gain, self.peak = view("gain", n, 1, 1, 1), view("peak", n)
        self.gain = gain
        features = view("features", n, a.hyper, rows, columns)
        correction = view("correction", n, contexts, rows, columns)
        self.pixels = flight.pixels
        if len(kind.cells) > 1:
            self.pixels = decoder.backend.empty((n, shape.height, shape.width, 3), np.uint8)
        bind = decoder.bind
        self.hyper = bind(
            decoder.hyper(rows, columns),
            {"latents": self.z, "gain": gain},
            {"features": features, "step": self.step},
        )
        self.stages: list[_Stage] = []
        for k, stage in enumerate(a.stages[: kind.stages]):
            places = len(lattice_positions(stage.lattice, rows, columns))
            if not places:
                continue
            classes = view("classes", n, stage.count, places)
            means = view("means", n, stage.count, places) if k < a.mean_stages else None
            outputs = {"class/places": classes}
            if means is not None:
                outputs["mean/places"] = means
            network, ports = decoder.stage(k, rows, columns)
            inputs = {"h": features, "plane": self.plane, "real": self.real}
            run = bind(network, {name: inputs[name] for name in ports}, outputs)
            where = decoder.where(stage.lattice, rows, columns)
            levels = view("levels", n, stage.count, places)
            is_context = stage.first < contexts
            self.stages.append(
                _Stage(k, stage.first, is_context, run, classes, means, levels, where)
            )
        self.correct = bind(decoder.chain, {"levels": self.chain}, {"correction": correction})
        # what several cells share is gone by the time that a peak is known
        self.half = decoder.settings.half and len(kind.cells) == 1
        flat = correction.reshape(n, contexts, positions), self.gains.reshape(n, positions)
        inputs = {
            "y": self.y, "correction": flat[0], "gains": flat[1],
            "colours": self.colours, "offset": self.offset,
        }  # fmt: skip
        outputs = {"pixels": self.pixels}
        with_peak = {**outputs, "peak": self.peak} if self.half else outputs
        self.paint = bind(decoder.synthesis(shape, channels, self.half), inputs, with_peak)
        self._whole = functools.partial(bind, inputs=inputs, outputs=outputs)
        self._again = functools.partial(decoder.synthesis, shape, channels, False)

    def paint_again(self) -> None:
        """In float32, after ``paint`` in float16."""
        self._whole(self._again())()


@dataclass(frozen=True, eq=False)
class _Stage:
    """A stage of the cells of a batch."""

    k: int
    first: int
    is_context: bool
    run: Run
    classes: Array
    means: Array | None
    levels: Array
    where: Array


@dataclass(eq=False)
class Pending:
    """A batch under way; ``result`` waits for it.

    marks: (step, moment at which it ended), the first of them the beginning.
    """

    decoder: BatchDecoder
    flight: _Flight
    streams: Streams | None
    faults: list[WsicodecError | None]
    images: Images
    marks: list[tuple[str, Any]] = field(default_factory=list)
    _decoded: Decoded | None = None

    def result(self) -> Decoded:
        """The batch, when it is done."""
        with self.decoder.lock:
            if self._decoded is None:
                self._decoded = self._settle()
                self.flight.pending = None
            return self._decoded

    def _settle(self) -> Decoded:
        backend, flight = self.decoder.backend, self.flight
        backend.wait(self.marks[-1][1])
        assert self.streams is not None
        errors = self.streams.errors()[: len(self.faults)]
        self.streams = None  # memory that uploads were staged in is free
        errors = [fault or error for fault, error in zip(self.faults, errors, strict=True)]
        cell = flight.cells[0]
        if cell.half:
            peaks = backend.fetch(cell.peak)[: len(errors)]
            if not all(p <= 1 for p, e in zip(peaks, errors, strict=True) if e is None):
                cell.paint_again()
                self.images = backend.images(flight.pixels, self.images)
                backend.wait(backend.mark())
        images = self.images
        if len(errors) < flight.count:
            images = images.first(len(errors))
        return Decoded(images, errors)

    def seconds(self) -> dict[str, float]:
        """Time of each of ``STEPS_OF_A_BATCH``, once ``result`` was called."""
        total = dict.fromkeys(STEPS_OF_A_BATCH, 0.0)
        for (_, first), (step, last) in zip(self.marks, self.marks[1:], strict=False):
            total[step] += self.decoder.backend.seconds(first, last)
        return total


class BatchDecoder:
    """Decodes batches of one model's tiles on a backend. One thread at a time gets in."""

    def __init__(
        self, model: DecoderModel, backend: Backend, settings: BatchSettings | None = None
    ) -> None:
        self.model, self.backend = model, backend
        self.settings = settings or BatchSettings()
        self.lock = threading.RLock()
        self._tables = backend.tables(model.tables)
        self._factors = backend.factors(model)
        self._plans: OrderedDict[tuple[Kind, int], list[_Flight]] = OrderedDict()
        self._networks: OrderedDict[object, Any] = OrderedDict()

    # -- networks, each built when first needed --

    def _kept(self, key: object, build: Callable[[], Any]) -> Any:
        if key not in self._networks:
            self._networks[key] = build()
            shaped = [k for k in self._networks if isinstance(k, Synthesis)]
            for old in shaped[:-SESSIONS]:
                del self._networks[old]
        return self._networks[key]

    def bind(self, network: Network, inputs: dict[str, Array], outputs: dict[str, Array]) -> Run:
        """A network's call between arrays of the backend."""
        return self.backend.bind(network, inputs, outputs)

    def hyper(self, rows: int, columns: int) -> Network:
        """For grids with rows and columns as odd as these."""
        odd = rows % 2 == 1, columns % 2 == 1
        data = self.model.graph_bytes("hyper")
        found: Network = self._kept(
            ("hyper", odd), lambda: self.backend.network(hyper_graph(data, *odd))
        )
        return found

    def stage(self, k: int, rows: int, columns: int) -> tuple[Network, list[str]]:
        """A stage, and the names of its inputs."""
        a = self.model.architecture
        lattice = a.stages[k].lattice
        places, key = None, ("stage", k, 0, 0)
        if lattice and min(rows, columns) == 1:
            places, key = lattice_positions(lattice, rows, columns), ("stage", k, rows, columns)

        def build() -> tuple[Network, list[str]]:
            seen = a.seen(k) if k else 0
            data = self.model.graph_bytes(f"stage{k}")
            graph, ports = stage_graph(data, lattice, seen, a.context_channels, places)
            return self.backend.network(graph), ports

        found: tuple[Network, list[str]] = self._kept(key, build)
        return found

    @property
    def chain(self) -> Network:
        data = self.model.graph_bytes("chain")
        found: Network = self._kept("chain", lambda: self.backend.network(chain_graph(data)))
        return found

    def synthesis(self, shape: CellShape, channels: int, half: bool) -> Network:
        """For cells of a shape with so many coded channels."""
        key = Synthesis(shape, channels, half)
        found: Network = self._kept(key, lambda: self.backend.network(key.graph(self.model)))
        return found

    def mosaic(self, rows: int, columns: int) -> Network:
        """For tiles of so many rows and columns of cells."""
        found: Network = self._kept(
            ("mosaic", rows, columns), lambda: self.backend.network(mosaic_graph(rows, columns))
        )
        return found

    def where(self, lattice: int, rows: int, columns: int) -> Array:
        """Positions of a lattice, on the backend."""
        places = lattice_positions(lattice, rows, columns)
        return self._kept(("where", lattice, rows, columns), lambda: self.backend.constant(places))

    def close(self) -> None:
        """Wait for what is under way, and give up buffers and sessions; the next batch makes them
        anew."""
        with self.lock:
            for flights in self._plans.values():
                for flight in flights:
                    if flight.pending is not None:
                        flight.pending.result()
            self._plans.clear()
            self._networks.clear()

    # -- batches --

    def most(self, kind: Kind) -> int:
        """Tiles of a kind that fit a batch; SettingsError where not even one does."""
        memory = self.settings.memory or self.backend.memory
        needed = bytes_of_tile(self.model, kind, self.settings.flights)
        count = memory // needed
        if count < 1:
            raise SettingsError(
                f"a tile of {kind.width} x {kind.height} pixels takes {needed} bytes on the "
                f"{self.backend.kind} backend: memory={memory} is too little"
            )
        return min(self.settings.tiles, count)

    def _flight(self, kind: Kind, count: int) -> _Flight:
        """Free buffers for a batch, those of other plans given up where memory asks for it."""
        key = kind, count
        if key not in self._plans:
            budget = self.settings.memory or self.backend.memory
            while self._plans and (
                len(self._plans) >= PLANS or self._held() + self._cost(kind, count) > budget
            ):
                _, flights = self._plans.popitem(last=False)
                for flight in flights:
                    if flight.pending is not None:
                        flight.pending.result()
            self._plans[key] = []
        self._plans.move_to_end(key)
        flights = self._plans[key]
        if len(flights) < self.settings.flights:
            flights.append(_Flight(self, kind, count))
        else:
            flights.append(flights.pop(0))  # the one that is longest under way
        flight = flights[-1]
        if flight.pending is not None:
            flight.pending.result()
        return flight

    def _cost(self, kind: Kind, count: int) -> int:
        return count * bytes_of_tile(self.model, kind, self.settings.flights)

    def _held(self) -> int:
        return sum(self._cost(kind, count) for kind, count in self._plans)

    def submit(
        self, tiles: Sequence[Tile], *, count: int | None = None, trace: Trace | None = None
    ) -> Pending:
        """Begin to decode learned tiles of one kind. Raises what is wrong with all of them; what
        is wrong with one is found in the result.

        count: of tiles that buffers are made for, so that batches of nearly as many can share them.
        """
        kind = Kind.of(tiles[0])
        room = max(count or 0, len(tiles))
        a = self.model.architecture
        if kind.stages > len(a.stages):
            raise FormatError(f"tile has {kind.stages} stages, its model {len(a.stages)}")
        if room > self.most(kind):
            raise SettingsError(f"{room} tiles do not fit a batch, {self.most(kind)} do")
        heads = []
        for tile in tiles:
            header = tile.learned
            if header is None or Kind.of(tile) != kind:
                raise UnsupportedError("tiles of a batch must be learned ones of one kind")
            if header.model != self.model.digest[:4]:
                raise UnknownModelError(
                    f"tile was coded with model {header.model.hex()}, not {self.model.name}"
                )
            heads.append(header)
        cells = len(kind.cells)
        faults: list[WsicodecError | None] = [None] * len(tiles)
        turns, payloads = [], []
        for n, tile in enumerate(tiles):
            try:
                turns.append(_read_turns(tile.payload, cells))
                payloads.append(tile.payload[TURN_BYTES * cells :])
            except FormatError as error:
                faults[n] = error
                turns.append([PLAIN] * cells)
                payloads.append(b"")
        # places that no tile takes hold streams that end at once
        spare = room - len(tiles)
        payloads += [b""] * spare
        turns += [[PLAIN] * cells] * spare
        heads += [heads[-1]] * spare
        with self.lock:
            flight = self._flight(kind, room)
            marks = [("begin", self.backend.mark())]
            streams = self.backend.streams(payloads, self._tables, 1 << kind.lanes_log2)
            first = flight.cells[0]
            gains = np.array([h.gain for h in heads], np.uint8)
            self.backend.put(first.indices, gains)
            self.backend.put(first.gain, gains.astype(np.float32).reshape(first.gain.shape))
            tilts = np.array([h.tilt for h in heads], np.uint8)
            self.backend.put(first.tilts, tilts)
            tilted = any(not self.model.factors[tilt].plain for tilt in set(tilts.tolist()))
            work = _Work(self, flight, streams, gains, tilted, marks, trace)
            for n, cell in enumerate(flight.cells):
                work.cell(n, cell, [turn[n] for turn in turns])
            streams.close()
            if flight.mosaic is not None:
                flight.mosaic()
            images = self.backend.images(flight.pixels, None)
            work.mark("synthesis")
            flight.pending = Pending(self, flight, streams, faults, images, marks)
            return flight.pending

    def decode(self, tiles: Sequence[Tile], *, trace: Trace | None = None) -> Decoded:
        """Decode learned tiles of one kind, as many as ``most`` allows."""
        return self.submit(tiles, trace=trace).result()

    def stream(self, tiles: Sequence[Tile]) -> Any:
        """Decode any number of learned tiles of one kind: (index of the first tile, ``Decoded``) of
        batch after batch, the next one under way."""
        most = self.most(Kind.of(tiles[0]))
        rounds = -(-len(tiles) // most)
        count = -(-len(tiles) // rounds)
        waiting: list[tuple[int, Pending]] = []
        for begin in range(0, len(tiles), count):
            batch = tiles[begin : begin + count]
            waiting.append((begin, self.submit(batch, count=count)))
            if len(waiting) >= self.settings.flights:
                at, pending = waiting.pop(0)
                yield at, pending.result()
        for at, pending in waiting:
            yield at, pending.result()


@dataclass(frozen=True, eq=False)
class _Work:
    """One batch on its way."""

    decoder: BatchDecoder
    flight: _Flight
    streams: Streams
    gains: npt.NDArray[np.uint8]
    tilted: bool
    marks: list[tuple[str, Any]]
    trace: Trace | None

    def mark(self, step: str) -> None:
        """End a step."""
        self.marks.append((step, self.decoder.backend.mark()))

    def _told(self, cell: int, stage: int, symbols: Array) -> None:
        if self.trace is not None:
            self.trace(cell, stage, self.decoder.backend.fetch(symbols))

    def cell(self, n: int, cell: _Cell, turns: Sequence[Turn]) -> None:
        """All steps of the tiles' cells of one place, to their pixels."""
        backend, model = self.decoder.backend, self.decoder.model
        factors, streams = self.decoder._factors, self.streams
        colours = np.stack([colours_of(model, turn) for turn in turns])
        backend.put(cell.colours, np.ascontiguousarray(colours[:, :, :3]))
        backend.put(cell.offset, np.ascontiguousarray(colours[:, :, 3:]))
        classes = np.empty(tuple(cell.z_classes.shape), np.uint8)
        classes[...] = model.z_classes[self.gains][:, :, None, None]
        backend.put(cell.z_classes, classes)
        backend.fill(cell.y, 0)
        backend.fill(cell.real, 0)
        backend.fill(cell.chain, 128)
        self.mark("upload")
        shape = (len(turns), model.architecture.z_channels, int(np.prod(cell.shape.hyper)))
        streams.decode(cell.z_classes.reshape(shape), False, cell.symbols.reshape(shape))
        self._told(n, -1, cell.symbols.reshape(shape))
        self.mark("rans")
        backend.hyper_latents(cell.symbols, cell.z, streams.state)
        cell.hyper()
        backend.effective_gains(cell.step, cell.indices, cell.gains, cell.plane, cell.chain)
        self.mark("networks")
        for stage in cell.stages:
            stage.run()
            self.mark("networks")
            if self.tilted:
                backend.shift_classes(stage.classes, factors, cell.tilts, stage.first)
            streams.decode(stage.classes, True, stage.levels)
            self._told(n, stage.k, stage.levels)
            self.mark("rans")
            chain, real = (cell.chain, cell.real) if stage.is_context else (None, None)
            backend.dequantise(
                stage.levels, stage.means, stage.where, cell.gains, factors, cell.tilts,
                stage.first, cell.y, chain, real, streams.state,
            )  # fmt: skip
            self.mark("dequantise")
        cell.correct()
        self.mark("networks")
        cell.paint()
        self.mark("synthesis")
