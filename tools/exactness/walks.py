"""Walks: tiles of a shipped model whose symbols are drawn from a hash, not searched in a picture.

Encoders choose symbols with real numbers, so what they write may differ between machines. A walk's
symbols come from SHAKE-256; classes, means and contexts follow from them in integers alone. Its
tile, and every number that its networks gave, are therefore the same on every machine, and so are
their hashes, which docs/exactness.json keeps. Of the conformance vectors'
models, 8-bit kernels take few layers and compiled programs none; walks are for what runs a shipped
model.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tools.exactness.executions import second_decoder
from tools.exactness.reading import digest_of
from tools.make_conformance import encode_symbols, symbol_steps
from wsicodec.bitstream import LearnedHeader, Mode, Tile
from wsicodec.codec.cell import CellJob, CellLatents, cells_of, code_cells
from wsicodec.codec.colours import Turn
from wsicodec.entropy.kernel import Encoder
from wsicodec.entropy.reference import state_after
from wsicodec.entropy.tables import SYMBOL_PEAK
from wsicodec.models.decoder import Z_PEAK, DecoderModel

Array = np.ndarray[Any, Any]

TURN: Turn = (11, -60, 90)


@dataclass(frozen=True)
class Walk:
    """Size in pixels, gain index and tilt of a tile. stages: 0 for all that the model has."""

    height: int
    width: int
    gain: int
    tilt: int = 0
    stages: int = 0
    lanes_log2: int = 2

    @property
    def name(self) -> str:
        stages = f"-stages{self.stages}" if self.stages else ""
        return f"{self.height}x{self.width}-gain{self.gain}-tilt{self.tilt}{stages}"


WALKS = (
    Walk(1, 1, 128),
    Walk(16, 80, 60, 8),
    Walk(80, 16, 200, 16),
    Walk(33, 70, 0, 3),
    Walk(48, 80, 255, 8, lanes_log2=5),
    Walk(112, 144, 90, 8, stages=9),
    Walk(128, 128, 170, 7),
    Walk(528, 40, 120, 16, lanes_log2=0),
)


@dataclass(frozen=True)
class Walked:
    """tile: its bytes. symbols: as ``read_symbols`` gives them. numbers: what the networks gave, by
    cell and name, in order. latents: of the cells; none of the second decoder."""

    tile: Tile
    symbols: list[Array]
    numbers: dict[str, Array]
    latents: list[CellLatents] = field(default_factory=list)

    def digests(self) -> dict[str, str]:
        """SHA-256 of the tile, of its symbols, and of the networks' numbers as int16,
        little-endian."""
        networks = hashlib.sha256()
        for array in self.numbers.values():
            networks.update(array.astype("<i2").tobytes())
        return {
            "tile": hashlib.sha256(self.tile.pack()).hexdigest(),
            "symbols": digest_of(self.symbols),
            "networks": networks.hexdigest(),
        }


class Chooser:
    """Draws symbols: most of them small, some at the format's bounds. ``second_decoder`` takes it
    for an entropy decoder."""

    def __init__(self, walk: Walk) -> None:
        self._walk, self._arrays, self._coded = walk, 0, 0
        self._lanes = 1 << walk.lanes_log2

    def _draw(self, count: int, peak: int) -> list[int]:
        """``count`` symbols within ±``peak``."""
        label = f"{self._walk.name} {self._arrays}"
        self._arrays += 1
        data = np.frombuffer(hashlib.shake_256(label.encode()).digest(4 * count), np.uint8)
        kind, low, *wide = data.reshape(count, 4).T.astype(np.int64)
        small = low >> 1
        bounds = [kind < 112, kind < 192, kind < 232, kind < 252, kind < 255]
        sizes = [0 * kind, 1 + 0 * kind, 2 + (small & 3), 6 + (small & 63), wide[0] << 8 | wide[1]]
        size = np.minimum(np.select(bounds, sizes, peak), peak)
        return [int(k) for k in np.where(low & 1, -size, size)]

    def hyper_latents(self, _model: Any, classes: Array) -> Array:
        self._coded += classes.size
        return np.array(self._draw(classes.size, Z_PEAK), np.int64).reshape(classes.shape)

    def indices(self, _model: Any, classes: Array, _cell: Any) -> tuple[Array, Array]:
        """Indices and quantisers of a stage's array; class 0 has neither."""
        flat = classes.reshape(-1)
        found, quantisers = np.zeros((2, flat.size), np.int64)
        states = [0] * self._lanes
        drawn = self._draw(flat.size, SYMBOL_PEAK)
        for place in np.flatnonzero(flat).tolist():
            lane = self._coded % self._lanes
            found[place], quantisers[place] = drawn[place], states[lane] & 1
            states[lane] = state_after(states[lane], drawn[place])
            self._coded += 1
        return found.reshape(classes.shape), quantisers.reshape(classes.shape)


def walked(walk: Walk, model: DecoderModel) -> Walked:
    """The walk with the model's networks, as they are run, and wsicodec's entropy coder."""
    a = model.architecture
    stages = walk.stages or len(a.stages)
    chooser, encoder = Chooser(walk), Encoder(model.tables, 1 << walk.lanes_log2)
    symbols: list[Array] = []
    numbers: dict[str, Array] = {}
    latents: list[CellLatents] = []

    def put(values: Array, classes: Array, dependent: bool) -> Array:
        levels = values.astype(np.int32)
        encoder.put(levels, classes, dependent=dependent)
        symbols.append(levels)
        return levels

    def hyper(classes: Array) -> Array:
        return put(chooser.hyper_latents(None, classes), classes, False)

    def stage(k: int, classes: Array, means: Array, _gains: Array) -> Array:
        numbers[f"cell {len(latents)}, stage {k}, classes"] = classes.copy()
        numbers[f"cell {len(latents)}, stage {k}, means"] = means.copy()
        indices, quantisers = chooser.indices(None, classes, None)
        return put(second_decoder.levels_of(indices, quantisers), classes, True)

    places = cells_of(walk.height, walk.width)
    for n, (_, _, shape) in enumerate(places):
        job = CellJob(walk.gain, walk.tilt, TURN, hyper, stage)
        (cell,) = code_cells(model, [job], stages, shape)
        numbers[f"cell {n}, gains"] = cell.gains
        numbers[f"cell {n}, corrections"] = np.array(cell.cells.corrections()[cell.index])
        latents.append(cell)
    header = LearnedHeader(model.digest[:4], walk.gain, stages, walk.lanes_log2, walk.tilt)
    payload = len(places) * struct.pack("<3b", *TURN) + encoder.finish()
    tile = Tile(Mode.LEARNED, walk.height, walk.width, payload, header)
    return Walked(tile, symbols, numbers, latents)


def walked_by_the_document(walk: Walk, file: bytes) -> Walked:
    """The walk by the second decoder and the entropy encoder of the conformance vectors, which
    share no line with wsicodec. Corrections are not among its numbers."""
    plain = second_decoder.read_model(file)
    model = second_decoder.tilted(plain, walk.tilt)
    stages = walk.stages or len(model.stages)
    chooser, steps = Chooser(walk), []
    symbols: list[Array] = []
    numbers: dict[str, Array] = {}
    places = cells_of(walk.height, walk.width)
    for n, (_, _, shape) in enumerate(places):
        size = shape.height, shape.width
        cell, _ = second_decoder.decode_cell(chooser, model, size, walk.gain, stages, TURN)
        z_classes = np.empty(cell.z.shape, np.int64)
        z_classes[:] = model.z_classes[walk.gain].astype(np.int64)[:, None, None]
        for k, c in zip(cell.z.reshape(-1).tolist(), z_classes.reshape(-1).tolist(), strict=True):
            steps.append(symbol_steps(k, c, 0, model))
        symbols.append(cell.z)
        for k in range(stages):
            numbers[f"cell {n}, stage {k}, classes"] = cell.classes[k]
            mean = cell.means[k]
            numbers[f"cell {n}, stage {k}, means"] = np.zeros((0, 0)) if mean is None else mean
            arrays = (cell.indices[k], cell.classes[k], cell.quantisers[k])
            for i, c, u in zip(*(x.reshape(-1).tolist() for x in arrays), strict=True):
                if c:
                    steps.append(symbol_steps(i, c, u, model))
            symbols.append(cell.levels[k])
        numbers[f"cell {n}, gains"] = cell.effective.reshape(-1)
    digest = hashlib.sha256(file).digest()
    header = LearnedHeader(digest[:4], walk.gain, stages, walk.lanes_log2, walk.tilt)
    payload = len(places) * struct.pack("<3b", *TURN) + encode_symbols(steps, 1 << walk.lanes_log2)
    tile = Tile(Mode.LEARNED, walk.height, walk.width, payload, header)
    return Walked(tile, symbols, numbers)
