"""The learned mode: images to symbols to tiles and back, with a model's networks."""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from wsicodec.bitstream import LearnedHeader, Mode, Tile
from wsicodec.codec.adaptive import adaptive_steps
from wsicodec.codec.analysis import bands_of
from wsicodec.codec.cell import (
    STEPS,
    CellJob,
    CellLatents,
    CellShape,
    cells_of,
    code_cells,
    decode_cell,
    errors_saved,
    quantise_stage,
    read_cells,
    synthesise,
)
from wsicodec.codec.colours import PLAIN, Turn, rotation
from wsicodec.codec.cosine import BANDS
from wsicodec.codec.protocol import Image
from wsicodec.entropy.kernel import Decoder, Encoder
from wsicodec.errors import TruncatedError, UnknownModelError
from wsicodec.models.decoder import GAINS, Z_PEAK, DecoderModel
from wsicodec.models.encoder import EncoderModel, gain_beside
from wsicodec.models.factors import LEADING, Factors
from wsicodec.models.lattice import lattice_positions

LANES_LOG2 = 2
TURN_BYTES = 3
STAGE_WORTH = 1.3
"""Bits that a stage's errors must be worth to the search, for each that it takes. A finer gain for
all stages often has the better exchange, up to 2 for SSIM; more than this makes quality jump where
the stage comes in."""

Coded = tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8]]
"""Values (hyper-latents, levels of stages) and their classes, of one stage of one cell."""


@dataclass(frozen=True)
class Search:
    """What an encoder aims at beyond its gain index.

    strength: of the adaptive step, 0 (best PSNR) ... 1.
    lagrange: bits that a squared error of one step is worth; infinite: nearest levels.
    rgb: 0 weighs errors as the steps do; 1 as squared errors of RGB.
    hyper: let the network choose hyper-latents; all but the adaptive step are zero otherwise.
    passes: passes over the symbols. All but the first know what correction the decoder's chain
    makes of the symbols of the pass before, and aim at what it leaves to be coded.
    aim: share of the chain's correction that they count on.
    tilt: of steps of channels against one another, 0 (as SSIM has them) ... 16 (squared error of
        RGB).
    """

    strength: float
    lagrange: float
    rgb: float = 0.0
    hyper: bool = True
    passes: int = 1
    aim: float = 1.0
    tilt: int = 0

    def worth(self, rgb_energy: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Lagrange multiplier of each channel, given the RGB energy of a step in it."""
        return (np.float32(self.lagrange) * rgb_energy ** np.float32(self.rgb)).astype(np.float32)


def usual_search(encoder: EncoderModel) -> Search:
    """The search that a model's encoder was made for."""
    return Search(encoder.step_strength, encoder.lagrange, encoder.rgb, tilt=encoder.tilt)


def decode_tile(tile: Tile, model: DecoderModel) -> Image:
    """Pixels of a learned tile."""
    out = np.empty((tile.height, tile.width, 3), np.uint8)
    decode_tiles([tile], model, [out])
    return out


def decode_tiles(tiles: Sequence[Tile], model: DecoderModel, outs: Sequence[Image]) -> None:
    """Pixels of learned tiles of one size and number of stages into ``outs``.

    onnxruntime runs networks once for all tiles; compiled programs go tile by tile, since what they
    work on then stays in the caches. Raises as soon as one tile is at fault.
    """
    streams, headers, turns = [], [], []
    places = cells_of(tiles[0].height, tiles[0].width)
    for tile in tiles:
        assert tile.learned is not None
        header = tile.learned
        if header.model != model.digest[:4]:
            raise UnknownModelError(
                f"tile was coded with model {header.model.hex()}, not {model.name}"
            )
        headers.append(header)
        turns.append(_read_turns(tile.payload, len(places)))
        coded = tile.payload[TURN_BYTES * len(places) :]
        streams.append(Decoder(coded, model.tables, 1 << header.lanes_log2))
    for n, (top, left, shape) in enumerate(places):
        views = [o[top : top + shape.height, left : left + shape.width] for o in outs]
        if model.fused is None:
            cells = read_cells(
                model, streams, [h.gain for h in headers], [h.tilt for h in headers],
                [t[n] for t in turns], headers[0].stages, shape,
            )  # fmt: skip
            synthesise(model, cells, views)
            continue
        for stream, header, turn, view in zip(streams, headers, turns, views, strict=True):
            decode_cell(
                model, stream, header.gain, header.tilt, turn[n], header.stages, shape, view
            )
    for stream in streams:
        stream.finish()


def _read_turns(payload: bytes, cells: int) -> list[Turn]:
    """The turns of a tile's cells, from the beginning of its payload."""
    if len(payload) < TURN_BYTES * cells:
        raise TruncatedError("learned tile ends among the turns of its colours")
    values = struct.unpack(f"<{TURN_BYTES * cells}b", payload[: TURN_BYTES * cells])
    return [(a, b, c) for a, b, c in zip(*[iter(values)] * TURN_BYTES, strict=True)]


def encode_tile(
    image: Image,
    model: DecoderModel,
    encoder: EncoderModel,
    gain: int,
    search: Search | None = None,
) -> Tile:
    """A learned tile of an image at a gain index; ``search`` None takes the encoder's own."""
    return TileEncoder(image, model, encoder).encode(gain, search).tile


@dataclass(frozen=True, eq=False)
class CodedCell:
    """Symbols of a cell, hyper-latents and then one entry per stage, and what they decode to.

    saved: by stage, for stages that could be left out, the bits that the errors they take away are
    worth to the search.
    """

    symbols: list[Coded]
    latents: CellLatents
    saved: dict[int, float]

    def cut(self, stages: int, channels: int) -> CodedCell:
        """Without the stages from ``stages`` on, which no other stage sees."""
        latents = replace(self.latents, stages=stages, y=self.latents.y[:channels])
        return CodedCell(self.symbols[: stages + 1], latents, self.saved)


@dataclass(frozen=True, eq=False)
class CodedTile:
    """A coded tile, and what its decoder makes of it."""

    tile: Tile
    cells: list[CodedCell]
    model: DecoderModel

    @functools.cached_property
    def pixels(self) -> Image:
        """Exactly what ``decode_tile`` gives, without reading the stream again."""
        out = np.empty((self.tile.height, self.tile.width, 3), np.uint8)
        places = cells_of(self.tile.height, self.tile.width)
        for (top, left, shape), cell in zip(places, self.cells, strict=True):
            view = out[top : top + shape.height, left : left + shape.width]
            synthesise(self.model, [cell.latents], [view])
        return out

    @functools.cached_property
    def data(self) -> bytes:
        """The tile's bytes."""
        return self.tile.pack()


class TileEncoder:
    """Codes one image, at as many gain indices as are asked for.

    What does not depend on the gain is computed once.
    """

    def __init__(self, image: Image, model: DecoderModel, encoder: EncoderModel) -> None:
        self.image, self.model, self.encoder = image, model, encoder
        height, width = image.shape[:2]
        self._cells = [
            CellEncoder(
                image[top : top + shape.height, left : left + shape.width], shape, model, encoder
            )
            for top, left, shape in cells_of(height, width)
        ]

    def encode(self, gain: int, search: Search | None = None) -> CodedTile:
        """The tile at a gain index; ``search`` None takes the encoder's own.

        Where the search has another tilt than the encoder's own, the tile's gain index is the one
        at which steps of the leading channels are as large, in the mean.
        """
        model, encoder = self.model, self.encoder
        if search is None:
            search = usual_search(encoder)
        limit = max(1, int((encoder.stage_gain <= gain).sum()))
        gain = min(max(gain + gain_beside(model, encoder, search.tilt), 0), GAINS - 1)
        cells = [cell.encode(gain, limit, search) for cell in self._cells]
        a = model.architecture
        # trailing stages without means and without symbols decode to nothing: leave them out
        stages = limit
        while stages > max(1, a.mean_stages) and not any(
            cell.symbols[stages][0].any() for cell in cells
        ):
            stages -= 1
        payload = self._stream(cells, stages)
        # one that no other stage sees has to be worth its bits
        while stages > 1 and all(stages - 1 in cell.saved for cell in cells):
            shorter = self._stream(cells, stages - 1)
            bits = 8 * (len(payload) - len(shorter))
            if sum(cell.saved[stages - 1] for cell in cells) >= STAGE_WORTH * bits:
                break
            stages, payload = stages - 1, shorter
        cells = [cell.cut(stages, a.channels_of(stages)) for cell in cells]
        tilt = 0 if model.factors[search.tilt].plain else search.tilt
        header = LearnedHeader(model.digest[:4], gain, stages, LANES_LOG2, tilt)
        height, width = self.image.shape[:2]
        turns = b"".join(struct.pack("<3b", *cell.latents.turn) for cell in cells)
        tile = Tile(Mode.LEARNED, height, width, turns + payload, header)
        return CodedTile(tile, cells, model)

    def _stream(self, cells: Sequence[CodedCell], stages: int) -> bytes:
        stream = Encoder(self.model.tables, 1 << LANES_LOG2)
        for cell in cells:
            for k, (values, classes) in enumerate(cell.symbols[: stages + 1]):
                stream.put(values, classes, dependent=k > 0)
        return stream.finish()


class CellEncoder:
    """Codes one cell: pixels to symbols."""

    def __init__(
        self, pixels: Image, shape: CellShape, model: DecoderModel, encoder: EncoderModel
    ) -> None:
        self.pixels, self.shape, self.model, self.encoder = pixels, shape, model, encoder
        self.bands = bands_of(pixels, shape, model)
        # one turn for all gains: another one means other classes, and with them a step in quality
        self.turn = self.bands.turn() if encoder.turned else PLAIN
        self.latents = self.bands.latents(model, self.turn)

    def encode(self, gain: int, stages: int, search: Search) -> CodedCell:
        """The cell's symbols at a gain index, ``stages`` stages of them."""
        a = self.model.architecture
        z = self._hyper(gain, search)
        cell = self._code(self.latents, z, gain, stages, search)
        for _ in range(1, search.passes):
            target = self.latents.copy()
            target[: a.context_channels] -= np.float32(search.aim) * self._correction(cell.latents)
            cell = self._code(target, z, gain, stages, search)
        return cell

    def _hyper(self, gain: int, search: Search) -> npt.NDArray[np.int32]:
        """Hyper-latents: the adaptive step, then what the network makes of the latents."""
        a = self.model.architecture
        rows, columns = self.shape.latents
        z_rows, z_columns = self.shape.hyper
        z = np.zeros((a.z_channels, z_rows, z_columns), np.int32)
        z[0] = adaptive_steps(self.pixels, search.strength)
        if search.hyper:
            head = self.latents[: a.context_channels].reshape(-1, rows, columns)
            if (rows, columns) != (2 * z_rows, 2 * z_columns):
                pad = ((0, 0), (0, 2 * z_rows - rows), (0, 2 * z_columns - columns))
                head = np.pad(head, pad, mode="edge")
            plane = np.full((1, 1, *head.shape[1:]), gain, np.float32)
            others = self.encoder.hyper_analysis({"y": head[None], "plane": plane})[0][0]
            z[1:] = np.clip(np.rint(others), -Z_PEAK, Z_PEAK)
        return z

    def _correction(self, cell: CellLatents) -> npt.NDArray[np.float32]:
        """What the chain adds to the leading latents of a coded cell, (channels, positions)."""
        correction = cell.cells.corrections()[cell.index]
        change = (correction.astype(np.float32) - 128) * (STEPS / np.float32(64))[cell.gains, None]
        return np.asarray(change.T)

    def _rgb_energy(self, factors: Factors) -> npt.NDArray[np.float32]:
        """(channels,): squared RGB error of a step's error in each channel, 1 in the middle of the
        leading ones."""
        matrix = self.model.colours.astype(np.float64) @ rotation(self.turn).T
        planes = (matrix**2).sum(0)[self.model.order // BANDS]
        energy = planes * factors.inverse_gain**2
        return np.asarray(energy / np.exp(np.log(energy[:LEADING]).mean()), np.float32)

    def _code(
        self,
        y: npt.NDArray[np.float32],
        z: npt.NDArray[np.int32],
        gain: int,
        stages: int,
        search: Search,
    ) -> CodedCell:
        """The symbols of given latents and hyper-latents."""
        model, a = self.model, self.model.architecture
        factors = model.factors[search.tilt]
        worth = search.worth(self._rgb_energy(factors))
        symbols: list[Coded] = []
        saved: dict[int, float] = {}

        def hyper_source(classes: npt.NDArray[np.uint8]) -> npt.NDArray[np.int32]:
            symbols.append((z, classes))
            return z

        def stage_source(
            k: int, classes: npt.NDArray[np.uint8], means: Any, gains: Any
        ) -> npt.NDArray[np.int32]:
            channels = a.stages[k].channels
            where = lattice_positions(a.stages[k].lattice, *self.shape.latents)
            levels = quantise_stage(
                model, factors, k, y[channels], where, classes, means, gains, worth[channels],
                1 << LANES_LOG2,
            )  # fmt: skip
            symbols.append((levels, classes))
            unseen = k >= a.mean_stages and a.stages[k].first >= a.context_channels
            if unseen and np.isfinite(search.lagrange):
                saved[k] = errors_saved(
                    factors, y[channels], where, levels, gains, channels, worth[channels]
                )
            return levels

        job = CellJob(gain, search.tilt, self.turn, hyper_source, stage_source)
        return CodedCell(symbols, code_cells(model, [job], stages, self.shape)[0], saved)


def quantise_cell(
    pixels: Image,
    shape: CellShape,
    model: DecoderModel,
    encoder: EncoderModel,
    gain: int,
    stages: int,
    search: Search,
) -> list[Coded]:
    """Values and classes of a cell in coding order: hyper-latents, then one entry per stage."""
    return CellEncoder(pixels, shape, model, encoder).encode(gain, stages, search).symbols
