"""The learned mode: images to symbols to tiles and back, with a model's networks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from wsicodec.bitstream import LearnedHeader, Mode, Tile
from wsicodec.codec.adaptive import adaptive_steps
from wsicodec.codec.cell import (
    BLOCK,
    STEPS,
    CellJob,
    CellShape,
    StageSource,
    cells_of,
    code_cells,
    quantise_stage,
    synthesise,
)
from wsicodec.codec.protocol import Image
from wsicodec.entropy.kernel import Decoder, Encoder
from wsicodec.errors import UnknownModelError
from wsicodec.models.decoder import DecoderModel
from wsicodec.models.encoder import EncoderModel
from wsicodec.models.lattice import lattice_positions

LANES_LOG2 = 2

Coded = tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8]]
"""Values (hyper-latents, levels of stages) and their classes, of one stage of one cell."""


@dataclass(frozen=True)
class Search:
    """What an encoder aims at beyond its gain index.

    strength: of the adaptive step, 0 (best PSNR) ... 1.
    lagrange: bits that a squared error of one step is worth; infinite: nearest levels.
    chroma: what an error of colour alone is worth against one of luma, 0 ... 1.
    """

    strength: float
    lagrange: float
    chroma: float = 1.0

    def worth(self, luma_share: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Lagrange multiplier of each channel, given the luma share of its basis image."""
        weight = luma_share + np.float32(self.chroma) * (1 - luma_share)
        return (np.float32(self.lagrange) * weight).astype(np.float32)


def decode_tile(tile: Tile, model: DecoderModel) -> Image:
    """Pixels of a learned tile."""
    out = np.empty((tile.height, tile.width, 3), np.uint8)
    decode_tiles([tile], model, [out])
    return out


def decode_tiles(tiles: Sequence[Tile], model: DecoderModel, outs: Sequence[Image]) -> None:
    """Pixels of learned tiles of one size and number of stages into ``outs``.

    Networks run once for all tiles. Raises as soon as one tile is at fault.
    """
    streams, headers = [], []
    for tile in tiles:
        assert tile.learned is not None
        header = tile.learned
        if header.model != model.digest[:4]:
            raise UnknownModelError(
                f"tile was coded with model {header.model.hex()}, not {model.name}"
            )
        headers.append(header)
        streams.append(Decoder(tile.payload, model.tables, 1 << header.lanes_log2))
    jobs = [
        CellJob(header.gain, stream.get, _classes_alone(stream))
        for header, stream in zip(headers, streams, strict=True)
    ]
    for top, left, shape in cells_of(tiles[0].height, tiles[0].width):
        cells = code_cells(model, jobs, headers[0].stages, shape)
        views = [o[top : top + shape.height, left : left + shape.width] for o in outs]
        synthesise(model, cells, views)
    for stream in streams:
        stream.finish()


def _classes_alone(stream: Decoder) -> StageSource:
    """Decoders need of a stage its classes alone."""
    return lambda _k, classes, _means, _gains: stream.get(classes, dependent=True)


def encode_tile(
    image: Image,
    model: DecoderModel,
    encoder: EncoderModel,
    gain: int,
    search: Search | None = None,
) -> Tile:
    """A learned tile of an image at a gain index; ``search`` None takes the encoder's own."""
    height, width = image.shape[:2]
    search = Search(encoder.step_strength, encoder.lagrange) if search is None else search
    limit = max(1, int((encoder.stage_gain <= gain).sum()))
    coded: list[list[Coded]] = []
    for top, left, shape in cells_of(height, width):
        pixels = image[top : top + shape.height, left : left + shape.width]
        coded.append(quantise_cell(pixels, shape, model, encoder, gain, limit, search))
    # trailing stages without means and without symbols decode to nothing: leave them out
    stages = limit
    while stages > max(1, model.architecture.mean_stages) and not any(
        c[stages][0].any() for c in coded
    ):
        stages -= 1
    stream = Encoder(model.tables, 1 << LANES_LOG2)
    for cell in coded:
        for k, (values, classes) in enumerate(cell[: stages + 1]):
            stream.put(values, classes, dependent=k > 0)
    header = LearnedHeader(model.digest[:4], gain, stages, LANES_LOG2)
    return Tile(Mode.LEARNED, height, width, stream.finish(), header)


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
    a = model.architecture
    rows, columns = shape.latents
    worth = search.worth(encoder.luma_share(model))
    y = analyse(pixels, shape, model, encoder, gain)
    coded: list[Coded] = []
    z_rows, z_columns = shape.hyper
    head = y[: a.context_channels].reshape(-1, rows, columns)
    pad = ((0, 0), (0, 2 * z_rows - rows), (0, 2 * z_columns - columns))
    head = np.pad(head, pad, mode="edge")[None]
    plane = np.full((1, 1, *head.shape[2:]), gain, np.float32)
    z = encoder.hyper_analysis({"y": head, "plane": plane})[0][0]
    steps = adaptive_steps(whole_blocks(pixels, 2 * BLOCK).astype(np.float32), search.strength)
    z_hat = np.concatenate([steps[None], np.clip(np.rint(z), -127, 127).astype(np.int32)])

    def hyper_source(classes: npt.NDArray[np.uint8]) -> npt.NDArray[np.int32]:
        coded.append((z_hat, classes))
        return z_hat

    def stage_source(
        k: int, classes: npt.NDArray[np.uint8], means: Any, gains: Any
    ) -> npt.NDArray[np.int32]:
        channels = a.stages[k].channels
        where = lattice_positions(a.stages[k].lattice, rows, columns)
        levels = quantise_stage(
            model, k, y[channels], where, classes, means, gains, worth[channels], 1 << LANES_LOG2
        )
        coded.append((levels, classes))
        return levels

    code_cells(model, [CellJob(gain, hyper_source, stage_source)], stages, shape)
    return coded


def whole_blocks(pixels: Image, side: int) -> Image:
    """Pixels padded to multiples of ``side`` by repeating the last row and column."""
    pad = ((0, -pixels.shape[0] % side), (0, -pixels.shape[1] % side), (0, 0))
    return np.pad(pixels, pad, mode="edge")


def analyse(
    pixels: Image, shape: CellShape, model: DecoderModel, encoder: EncoderModel, gain: int
) -> npt.NDArray[np.float32]:
    """Latents (channels, positions) of a cell's pixels, edges replicated to whole blocks."""
    rows, columns = shape.latents
    blocks = (
        whole_blocks(pixels, BLOCK).reshape(rows, BLOCK, columns, BLOCK, 3).transpose(0, 2, 1, 3, 4)
    )
    flat = blocks.reshape(rows * columns, -1).astype(np.float32) - 128
    linear = encoder.forward_transform(model)({"y": flat})[0]
    y = np.ascontiguousarray(linear.T)
    plane = np.full((1, 1, rows, columns), gain, np.float32)
    correction = encoder.analysis(
        {
            "blocks": np.ascontiguousarray(flat.T).reshape(1, -1, rows, columns),
            "linear": y[: encoder.corrected].reshape(1, -1, rows, columns),
            "plane": plane,
        }
    )[0]
    y[: encoder.corrected] += STEPS[gain] * correction.reshape(encoder.corrected, -1)
    return y
